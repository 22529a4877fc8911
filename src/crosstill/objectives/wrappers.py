"""Losses around losses: one loss for each width of an embedding.

A wrapper takes over what its loss declares, but for candidate lists: scores of lists have no rows
that could be cut.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from crosstill.objectives.base import Objective
from crosstill.types import Features


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
