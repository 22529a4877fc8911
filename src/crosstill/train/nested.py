"""Losses of a student with several widths: each at every width, and the mean of them.

See `crosstill.students.matryoshka` for what a width is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosstill import objectives
from crosstill.cache import Cache, CacheBase
from crosstill.errors import MismatchError
from crosstill.objectives import Objective
from crosstill.students import matryoshka
from crosstill.students.student import Student
from crosstill.train.config import TrainConfig
from crosstill.types import Features


class Nested(Objective):
    """A loss at every width.

    Args:
        whole: the loss at the full width, where nothing is turned.
        parts: the same loss made anew for each smaller width, so that a queue fits.
        axes: (D, D), columns, the largest first.
        unit: whether losses see unit rows of the student.
    """

    axes: Tensor

    def __init__(
        self, whole: Objective, parts: Mapping[int, Objective], axes: Tensor, unit: bool
    ) -> None:
        super().__init__()
        self.whole, self._unit = whole, unit
        self.parts = nn.ModuleDict({str(width): part for width, part in parts.items()})
        self.needs, self.reads, self.ratio = whole.needs, whole.reads, whole.ratio
        self.register_buffer("axes", axes, persistent=False)  # the student keeps it

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        found = [self.whole(student, teacher, ids)]
        for width, part in self.parts.items():
            axes = self.axes[:, : int(width)]
            cuts = matryoshka.cut(student, axes, self._unit), matryoshka.cut(teacher, axes)
            found.append(part(*cuts, ids))
        return torch.stack(found).mean()

    def update(self, teacher: Features, ids: Tensor) -> None:
        self.whole.update(teacher, ids)
        for width, part in self.parts.items():
            loss: Any = part
            loss.update(matryoshka.cut(teacher, self.axes[:, : int(width)]), ids)


def fit(student: Student, losses: nn.ModuleDict, cache: CacheBase, config: TrainConfig) -> None:
    """Find a new student's axes, and let losses of embeddings see each of its widths.

    Losses that read layers stay as they are: layers have no widths. Nothing happens to a student
    of one width, nor the second time.

    Raises:
        MismatchError: there are no teacher rows of the student's own width to cut.
    """
    if not student.config.widths:
        return
    if not isinstance(cache, Cache) or config.targets == "each":
        raise MismatchError(
            f"widths of {student.name}: are learnt from the rows of a feature cache, all teachers "
            "joined; leave widths out"
        )
    if cache.dim not in (None, student.dim):
        return  # which is refused by whoever compares the widths
    if cache.modalities and torch.equal(student.axes.cpu(), torch.eye(student.dim)):
        student.axes.copy_(_axes(cache, config.train_split))
    keys = cache.keys[cache.split(config.train_split).images]
    for name, options in config.losses.items():
        loss: Any = losses[name]
        if isinstance(loss, Nested) or loss.reads == "hidden":
            continue
        parts = {
            width: objectives.build(name, dim=width, seed=config.seed, keys=keys, **options)
            for width in student.widths[:-1]
        }
        losses[name] = Nested(loss, parts, student.axes.detach().clone(), config.normalise)


def _axes(cache: Cache, split: str) -> Tensor:
    """The principal axes of what the teacher said of a split, of evenly spread rows."""
    rows, sides = cache.split(split), []
    if "image" in cache.modalities:
        sides.append(cache.image_features(rows.images[_spread(len(rows.images))]))
    if "text" in cache.modalities:
        sides.append(cache.text_features(rows.captions[_spread(len(rows.captions))]))
    return matryoshka.axes(sides)


def _spread(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, matryoshka.MOST)).astype(int)
