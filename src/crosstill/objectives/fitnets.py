"""Hints from an intermediate layer.

Romero et al., "FitNets", arXiv 1412.6550, eq. 3: a 1 x 1 convolution carries the student's layer
to the teacher's width, and its square error is the loss. Needs a teacher that runs beside the
student.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, mse_loss

from crosstill.objectives.base import Objective
from crosstill.objectives.parts.maps import smaller
from crosstill.types import Hidden


class Loss(Objective):
    """Mean square error of one image layer, after pooling both maps to the smaller one's size.

    The teacher's map is divided by the root mean square of a probe's, so that the loss is of the
    order of 1 whatever the architecture.

    Args:
        seed: of the convolution's start.
        layer: which block of each image tower: "first", "middle", "last" or a number.
    """

    reads = "hidden"
    needs = frozenset[str]()
    scale: Tensor
    regressor: nn.Conv2d

    def __init__(self, *, seed: int = 0, layer: str | int = "middle") -> None:
        super().__init__()
        self.layers = (str(layer),)
        self._seed = seed
        self.register_buffer("scale", torch.ones(()))

    def meet(self, student: Hidden, teacher: Hidden) -> None:
        mine, theirs = student.layers[self.layers[0]], teacher.layers[self.layers[0]]
        self.regressor = nn.Conv2d(mine.shape[1], theirs.shape[1], 1).to(theirs.device)
        bound = 1 / math.sqrt(mine.shape[1])
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for part in self.regressor.parameters():
                drawn = torch.rand(part.shape, generator=generator, dtype=part.dtype)
                part.copy_(bound * (2 * drawn - 1))
            self.scale.copy_(theirs.float().square().mean().sqrt().clamp_min(1e-6))

    def forward(self, student: Hidden, teacher: Hidden, ids: Tensor) -> Tensor:
        mine, theirs = (_wide(x.layers[self.layers[0]]) for x in (student, teacher))
        size = smaller(mine, theirs)
        mine, theirs = adaptive_avg_pool2d(mine, size), adaptive_avg_pool2d(theirs, size)
        weight, bias = (part.to(mine) for part in self.regressor.parameters())
        return mse_loss(conv2d(mine, weight, bias), theirs.detach().to(mine) / self.scale)


def _wide(maps: Tensor) -> Tensor:
    return maps if maps.dtype.itemsize >= 4 else maps.float()
