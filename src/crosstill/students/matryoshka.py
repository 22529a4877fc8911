"""One student, several embedding sizes (Matryoshka representations, arXiv 2205.13147).

The first w numbers of an embedding, at length 1, are an embedding too. The first of what is
decided by the teacher: its rows are turned to their principal axes, which changes no cosine and
puts the best w-dimensional picture of them (Eckart and Young, 1936) into the first w numbers.
So of student and teacher alike

    cut(r, w) = (r A_w) / |r A_w|,    A_w (D, w): the first w principal axes of the teacher's rows

and every loss fits every width. The student learns the mean over its widths of what each loss
says of both cuts (eq. 1 of the paper, with the weights 1 / |widths|). The full width is always
among them and is not turned, so that whoever compares student and teacher need not know of this.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.students.student import Student
from crosstill.towers.tower_parts import ImagePart, TextPart

MOST = 20_000  # rows a side: far more than there are axes


def axes(rows: Sequence[Tensor]) -> Tensor:
    """Principal axes (D, D) of several sets of rows that count alike, the largest first.

    They are columns, and not centred: cosines are of the rows as they are.

    Args:
        rows: (N, D) each, such as those of images and those of captions.
    """
    moments = [side.double().T @ side.double() / len(side) for side in rows]
    directions = torch.linalg.eigh(sum(moments[1:], start=moments[0])).eigenvectors.flip(1)
    # a sign for each, so that it depends on no library's whim
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return (directions * signs).float()


def shorten(student: Student, width: int) -> Student:
    """A student of the first `width` numbers: the same towers under smaller heads.

    Of a student with several widths they lie along its axes. At its full width, the first w
    numbers of what this gives are, at length 1, the embedding of any width w.

    Raises:
        ConfigError: it is not that wide.
    """
    if not 0 < width <= student.dim:
        raise ConfigError(f"{student.name}: has embeddings of {student.dim}, not of {width}")
    name = student.name if width == student.dim else f"{student.name}@{width}"
    changes = {"dim": width, "widths": (), "name": name}
    training, licences = student.training, student.licences
    with torch.random.fork_rng():
        again = Student(
            student.config.model_copy(update=changes),
            ImagePart(student.image_tower, student.preprocess, licences["image"]),
            TextPart(student.text_tower, student.tokenizer, licences["text"]),
        ).to(student.device)
    axes = student.axes if student.config.widths else torch.eye(student.dim, device=student.device)
    for side in ("image_head", "text_head"):
        weights = getattr(student, side).state_dict().items()
        turned = {name: axes[:, :width].T @ value for name, value in weights}
        getattr(again, side).load_state_dict(turned)
    again.source = student.source
    return again.train(training)
