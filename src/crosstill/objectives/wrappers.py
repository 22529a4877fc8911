"""Losses around losses: one loss for each width of an embedding.

One student, several embedding sizes (Matryoshka representations, arXiv 2205.13147): the first w
numbers of an embedding, at length 1, are an embedding too. The teacher decides what comes first:
its rows are turned to their principal axes, which changes no cosine and puts the best
w-dimensional picture of them (Eckart and Young, 1936) into the first w numbers. So of student and
teacher alike

    cut(r, w) = (r A_w) / |r A_w|,    A_w (D, w): the first w principal axes of the teacher's rows

and every loss fits every width. The student learns the mean over its widths of each loss of both
cuts (eq. 1 of the paper, with the weights 1 / |widths|). The full width is always among them and
is not turned, so that whoever compares student and teacher need not know of this.

A wrapper takes over what its loss declares, but for candidate lists: scores of lists have no rows
that could be cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosstill.objectives.base import Objective
from crosstill.types import Features, Ids

ROWS = 20_000  # of a side that principal axes are computed of: far more than there are axes


class PerWidth(Objective):
    """The mean of a loss at the full width and at each smaller width of a nested embedding.

    Args:
        whole: the loss at the full width, where nothing is turned.
        parts: the same loss made anew for each smaller width, so that a queue fits.
        axes: (D, D), columns, the largest first.
        unit: whether losses get unit rows of the student.
        unit_teacher: whether they get unit rows of the teacher.
    """

    axes: Tensor

    def __init__(
        self,
        whole: Objective,
        parts: Mapping[int, Objective],
        axes: Tensor,
        unit: bool,
        unit_teacher: bool = True,
    ) -> None:
        super().__init__()
        self.declare_like(whole)
        self.whole, self.lists = whole, None
        self._unit, self._unit_teacher = unit, unit_teacher
        self.parts = nn.ModuleDict({str(width): part for width, part in parts.items()})
        self.register_buffer("axes", axes, persistent=False)  # the student keeps it

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        values = [self.whole(student, teacher, ids)]
        for width, part in self.parts.items():
            axes = self.axes[:, : int(width)]
            shorter = cut(teacher, axes, self._unit_teacher)
            values.append(part(cut(student, axes, self._unit), shorter, ids))
        return torch.stack(values).mean()

    def update(self, teacher: Features, ids: Tensor | Ids) -> None:
        self.whole.update(teacher, ids)
        for width, part in self.parts.items():
            loss: Any = part
            loss.update(cut(teacher, self.axes[:, : int(width)], self._unit_teacher), ids)


def cut(features: Features, axes: Tensor, unit: bool = True) -> Features:
    """Project both sides on some axes: (B, D) → (B, w); an empty side stays empty.

    Args:
        features: of student or teacher.
        axes: (D, w).
        unit: whether to scale rows to length 1; else they keep their length.
    """
    sides = (side @ axes.to(side) if side.numel() else side for side in features)
    return Features(*(nn.functional.normalize(side, dim=-1) if unit else side for side in sides))


def principal_axes(rows: Sequence[Tensor]) -> Tensor:
    """Compute the principal axes (D, D) of several sets of rows, the largest first.

    All sets count alike. The axes are columns, and not centred: cosines are of the rows as they
    are.

    Args:
        rows: (N, D) each, such as those of images and those of captions.
    """
    moments = [side.double().T @ side.double() / len(side) for side in rows]
    directions = torch.linalg.eigh(sum(moments[1:], start=moments[0])).eigenvectors.flip(1)
    # a sign for each, the same in every library
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return (directions * signs).float()
