"""Give each loss of a student with several widths one loss a width: see `PerWidth`.

`crosstill.students.matryoshka` explains the widths.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosstill import objectives
from crosstill.cache import Cache
from crosstill.objectives.wrappers import PerWidth
from crosstill.students import matryoshka
from crosstill.students.student import Student
from crosstill.train.config import TrainConfig


def fit(student: Student, losses: nn.ModuleDict, cache: Cache, config: TrainConfig) -> None:
    """Set a new student's axes, and wrap its losses of embeddings for each of its widths.

    Losses that read layers stay as they are: layers have no widths. Nothing happens to a student
    of one width.
    """
    if not student.config.widths:
        return
    if cache.dim not in (None, student.dim):
        return  # the check of the widths refuses it next
    if cache.modalities and torch.equal(student.axes.cpu(), torch.eye(student.dim)):
        student.axes.copy_(_axes(cache, config.train_split))
    keys = cache.keys[cache.split(config.train_split).images]
    for name, options in config.losses.items():
        loss: Any = losses[name]
        if loss.reads.kind == "hidden":
            continue
        parts = {
            width: objectives.build(name, dim=width, seed=config.seed, keys=keys, **options)
            for width in student.widths[:-1]
        }
        losses[name] = PerWidth(loss, parts, student.axes.detach().clone(), config.normalise)


def _axes(cache: Cache, split: str) -> Tensor:
    """Compute the principal axes of a split's teacher features, from evenly spread rows."""
    rows, sides = cache.split(split), []
    if "image" in cache.modalities:
        sides.append(cache.image_features(rows.images[_spread(len(rows.images))]))
    if "text" in cache.modalities:
        sides.append(cache.text_features(rows.captions[_spread(len(rows.captions))]))
    return matryoshka.axes(sides)


def _spread(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, matryoshka.MOST)).astype(int)
