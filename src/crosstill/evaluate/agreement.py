"""Agreement of a student with its teacher, on photos and texts of which none belong together.

Without captions nothing says which photo is right for a text. What can be measured is how far the
student does what the teacher does. Two figures, in percent:

    overlap   how many of the teacher's ten best-scored photos for a text (and texts for a photo)
              the student has among its own ten; of one side alone, the ten nearest other photos
              (or texts) of each. The student is chosen by it: of ten results that a person would
              see with the teacher, so many come from the student.
    R@1/5/10  how often the student's row of a photo (or text) finds the teacher's row of the same
              one among all teacher's rows. It is near 100 long before the overlap is.

Tied scores have no order here; rows that are all alike overlap as chance has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import CacheBase, Split
from crosstill.evaluate.embedding import CachedSplit
from crosstill.evaluate.recall import Percent, Retrieval, retrieval
from crosstill.students.student import Student
from crosstill.types import Features

DEPTH = 10
MOST = 5_000  # rows of a side: a matrix of scores takes 100 MB then
_BLOCK = 512  # queries at a time


@dataclass(frozen=True)
class Agreement:
    """Agreement of a student's ranking with its teacher's, 0 to 100.

    Attributes:
        overlap: of the ten best, by what looks for what: "text→image" and "image→text", or
            "image→image" or "text→text" where there is one side alone.
        own: R@1, R@5 and R@10 of the teacher's own row, of each side that there is.
        images: photos that were ranked.
        captions: texts that were ranked.
    """

    overlap: dict[str, float]
    own: dict[str, Percent]
    images: int
    captions: int

    name: ClassVar[str] = "top-10 agreement"
    key: ClassVar[str] = "agreement"
    shared: ClassVar[int] = 0

    @property
    def heads(self) -> tuple[str, ...]:
        """As `Ranking.heads`."""
        own = [head for side in self.own for head in (f"own {side} R@1", "R@5", "R@10")]
        return *own, *(f"{way} overlap" for way in self.overlap), self.name

    @property
    def figures(self) -> tuple[float, ...]:
        """Own rows' recall, overlaps, and their mean."""
        own = [number for recall in self.own.values() for number in recall]
        return *own, *self.overlap.values(), self.value

    @property
    def value(self) -> float:
        """The mean overlap, by which the best epoch is chosen."""
        return sum(self.overlap.values()) / len(self.overlap)

    @property
    def warning(self) -> str | None:
        """One line when there are so few rows that any student agrees."""
        counts = {"photos": self.images, "texts": self.captions}
        few = [f"{count} {what}" for what, count in counts.items() if 0 < count <= DEPTH]
        if not few:
            return None
        return f"only {' and '.join(few)}: any student's ten best are the teacher's"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: agreement, overlap, own_row, counts, warning."""
        return {
            self.key: self.value,
            "overlap": self.overlap,
            "own_row": {side: recall._asdict() for side, recall in self.own.items()},
            "images": self.images,
            "captions": self.captions,
            "warning": self.warning,
        }


NAMES = {kind.key: kind.name for kind in (Retrieval, Agreement)}  # of rankings, by their keys


class AgreementSplit(CachedSplit):
    """A split of a cache without any pair, on which a student is compared with the teacher.

    See `without_pairs` for the rows that are looked at.
    """

    def __init__(
        self, cache: CacheBase, split: Split, student: Student, frozen: str = "none"
    ) -> None:
        super().__init__(cache, without_pairs(cache, split), student, frozen)
        self.teacher, self.learnt = both_rows(cache, self.split)

    def rank(self, features: Features) -> Agreement:
        """Measure how far these rows of a student's agree with the teacher's."""
        return agreement(features, self.teacher, self.learnt)

    def teacher_recall(self) -> None:
        """Return None: the teacher is what a student is measured by."""


def open_split(
    cache: CacheBase, split: Split, student: Student, frozen: str = "none"
) -> CachedSplit:
    """Open the pairs of a split for recall, or a split without any for agreement."""
    if split.pairs:
        return CachedSplit(cache, split.paired(), student, frozen)
    return AgreementSplit(cache, split, student, frozen)


def without_pairs(cache: CacheBase, split: Split) -> Split:
    """Choose the rows that agreement is measured on: `MOST` of a side, spread evenly over it.

    A side of which the teacher left no features is left out.
    """
    has = cache.modalities
    images = _spread(split.images) if "image" in has else split.images[:0]
    texts = _spread(split.captions) if "text" in has else split.captions[:0]
    name = split.name
    if (len(images), len(texts)) != (len(split.images), len(split.captions)):
        name += f"-{len(images)}-{len(texts)}"  # arrays are kept by the names of splits
    return Split(name, images, texts, np.full(len(texts), -1))


def both_rows(cache: CacheBase, split: Split) -> tuple[Features, Features]:
    """Read the teacher's rows of a split as it gave them, and as the student learns them.

    Args:
        cache: centred, or as it is.
        split: its rows; a side that the cache lacks is empty.
    """
    plain, learnt = (
        Features(*(sides.get(side, torch.empty(0)) for side in Features._fields))
        for sides in (cache.plain.split_sides(split), cache.split_sides(split))
    )
    return plain, learnt


def _spread(rows: np.ndarray) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(int)]


def agreement(student: Features, teacher: Features, learnt: Features | None = None) -> Agreement:
    """Measure how far a student ranks as its teacher.

    Args:
        student: (I, D) rows of photos and (T, D) of texts, either perhaps none.
        teacher: the same photos' and texts' rows; the sides may be as wide as they like.
        learnt: the teacher's rows in the student's own space, where that is another, as a centred
            one: among these own rows are looked for.

    Returns:
        The overlap of what looks for what, and how well own rows are found where the student is
        as wide as its teacher.
    """
    student, teacher, learnt = (
        Features(*(x.detach().float() for x in f)) for f in (student, teacher, learnt or teacher)
    )
    names = ("image", "text")
    there = [side for side, rows in enumerate(student) if len(rows)]
    ways = [(1, 0), (0, 1)] if len(there) == 2 else [(side, side) for side in there]
    overlap = {
        f"{names[query]}→{names[target]}": _overlap(
            (student[query], student[target]), (teacher[query], teacher[target]), query == target
        )
        for query, target in ways
    }
    own = {
        names[side]: retrieval(student[side], learnt[side], torch.arange(len(student[side]))).i2t
        for side in there
        if student[side].shape == learnt[side].shape
    }
    return Agreement(
        overlap, {side: recall.fair for side, recall in own.items()}, *map(len, student)
    )


def _overlap(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], alone: bool) -> float:
    """Compute the mean share of the ten best that two models have in common, in percent.

    Args:
        ours: (Q, D) queries and (N, D) candidates of one model.
        theirs: the same of the other.
        alone: whether the candidates are the queries, of which none finds itself.
    """
    depth = min(DEPTH, len(ours[1]) - alone)
    if depth < 1:
        return 100.0
    common = 0
    for mine, other in zip(_best(*ours, depth, alone), _best(*theirs, depth, alone), strict=True):
        common += int((mine[:, :, None] == other[:, None]).sum())
    return 100 * common / (depth * len(ours[0]))


def _best(queries: Tensor, candidates: Tensor, depth: int, alone: bool) -> Iterator[Tensor]:
    """Yield the best candidates of some queries at a time: (b, depth) int64."""
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ candidates.T
        if alone:
            scores[:, start:].fill_diagonal_(-torch.inf)
        yield scores.topk(depth, dim=1).indices
