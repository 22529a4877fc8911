"""Losses around losses: one for each teacher of several, one for each width of an embedding.

Both wrap a loss of embeddings and take over what it declares, but for candidate lists: scores of
lists have no rows that could be mapped or cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from crosstill.objectives.base import Objective
from crosstill.types import Features


class TeacherMap(nn.Module):
    """A linear map from the student's space to one teacher's, which learns with the student.

    Images and captions share the map, and it only turns: it keeps lengths and angles, as far as
    the teacher is wide enough. So a cosine that is right in the teacher's space is right in the
    student's own, where retrieval takes place. It is kept with the losses, not with the student.

    Args:
        columns: of the teacher's rows in the rows of all teachers side by side; D of them.
        seed: of the map's start.
        unit: whether losses get unit rows of the student.

    Attributes:
        weight: (D, d), √d times the map, so that a step of Adam turns it by about the learning
            rate.
    """

    weight: nn.Parameter

    def __init__(self, columns: slice, seed: int, unit: bool) -> None:
        super().__init__()
        self.columns, self.dim = columns, int(columns.stop - columns.start)
        self._seed, self._unit = seed, unit

    def reset(self, width: int) -> None:
        """Draw the map for a student of width d, anew."""
        generator = torch.Generator().manual_seed(self._seed)
        start = nn.init.orthogonal_(torch.empty(self.dim, width), generator=generator)
        self.weight = nn.Parameter(start * width**0.5)

    @property
    def map(self) -> Tensor:
        """(D, d), with orthonormal columns; where D < d with orthonormal rows."""
        return self.weight / self.weight.shape[1] ** 0.5

    @torch.no_grad()
    def assign(self, new: Tensor) -> None:
        """Set the map to a (D, d) matrix."""
        self.weight.copy_(new * self.weight.shape[1] ** 0.5)

    def align(self, basis: Tensor) -> None:
        """Set the map for a student whose coordinates are those of an orthonormal basis.

        Args:
            basis: (all D, d), joined rows are about `basis @ student`; columns of zeros leave
                the map as it is.
        """
        used = basis.any(0)
        start = self.map.detach().to(basis)
        start[:, used] = basis[self.columns, used].to(start)
        u, _, v = torch.linalg.svd(start, full_matrices=False)
        self.assign(u @ v)

    def reorthogonalise(self) -> None:
        """Move to the nearest map that keeps angles, by one Newton iteration, after a step.

        W (3 - W^T W) / 2 is enough for the change of one step (Björck and Bowie, SIAM J. Numer.
        Anal. 8:358, 1971).
        """
        now = self.map.detach()
        self.assign(1.5 * now - 0.5 * now @ (now.T @ now))

    def project(self, student: Features) -> Features:
        """Map the student's rows to the teacher's space: (B, d) → (B, D)."""
        rows = (linear(side, self.map.to(side)) for side in student)
        return Features(*(normalize(side, dim=1) if self._unit else side for side in rows))

    def own_rows(self, teachers: Features) -> Features:
        """Take the teacher's own unit rows out of the joined ones; an empty side stays empty."""
        rows = (side[:, self.columns] if side.ndim == 2 else side for side in teachers)
        return Features(*(normalize(side, dim=-1) for side in rows))


class PerTeacher(Objective):
    """A loss on one teacher's rows, through that teacher's map.

    Args:
        loss: the loss, of embeddings as wide as the teacher's.
        target: the map; all losses of a teacher share it.
        share: the teacher's weight, of 1 for all teachers together.
    """

    def __init__(self, loss: Objective, target: TeacherMap, share: float) -> None:
        super().__init__()
        self.declare_like(loss)
        self.loss, self.target = loss, target
        self.lists, self.share = None, share * loss.share

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        rows = self.target.project(student), self.target.own_rows(teacher)
        value: Tensor = self.loss(*rows, ids)
        return value

    def update(self, teacher: Features, ids: Tensor) -> None:
        self.target.reorthogonalise()
        self.loss.update(self.target.own_rows(teacher), ids)


class PerWidth(Objective):
    """The mean of a loss at the full width and at each smaller width of a nested embedding.

    Args:
        whole: the loss at the full width, where nothing is turned.
        parts: the same loss made anew for each smaller width, so that a queue fits.
        axes: (D, D), columns, the largest first.
        unit: whether losses get unit rows of the student.
    """

    axes: Tensor

    def __init__(
        self, whole: Objective, parts: Mapping[int, Objective], axes: Tensor, unit: bool
    ) -> None:
        super().__init__()
        self.declare_like(whole)
        self.whole, self._unit, self.lists = whole, unit, None
        self.parts = nn.ModuleDict({str(width): part for width, part in parts.items()})
        self.register_buffer("axes", axes, persistent=False)  # the student keeps it

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        values = [self.whole(student, teacher, ids)]
        for width, part in self.parts.items():
            axes = self.axes[:, : int(width)]
            values.append(part(cut(student, axes, self._unit), cut(teacher, axes), ids))
        return torch.stack(values).mean()

    def update(self, teacher: Features, ids: Tensor) -> None:
        self.whole.update(teacher, ids)
        for width, part in self.parts.items():
            loss: Any = part
            loss.update(cut(teacher, self.axes[:, : int(width)]), ids)


def cut(features: Features, axes: Tensor, unit: bool = True) -> Features:
    """Project both sides on some axes: (B, D) → (B, w); an empty side stays empty.

    Args:
        features: of student or teacher.
        axes: (D, w).
        unit: whether to scale rows to length 1; else they keep their length.
    """
    sides = (side @ axes.to(side) if side.numel() else side for side in features)
    return Features(*(normalize(side, dim=-1) if unit else side for side in sides))
