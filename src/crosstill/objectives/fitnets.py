"""Hints from an intermediate layer.

Romero et al., "FitNets", arXiv 1412.6550, eq. 3: a 1 x 1 convolution carries the student's layer
to the teacher's width, and its square error is the loss. Needs a teacher that runs beside the
student.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, mse_loss

from crosstill.objectives.at import common_size
from crosstill.objectives.base import Input, Objective
from crosstill.objectives.parts import widened
from crosstill.types import Hidden, Ids


class FitNets(Objective):
    """Mean square error of one image layer, after pooling both maps to the smaller one's size.

    The teacher's map is divided by the root mean square of a probe's, so that the loss is of the
    order of 1 whatever the architecture.

    Args:
        seed: of the convolution's start.
        layer: which block of each image tower: "first", "middle", "last" or a number.
    """

    needs = frozenset[str]()
    pairs = False
    scale: Tensor
    regressor: nn.Conv2d

    def __init__(self, *, seed: int = 0, layer: str | int = "middle") -> None:
        super().__init__()
        self.layer = str(layer)
        self.reads = Input("hidden", layers=(self.layer,))
        self._seed = seed
        self.register_buffer("scale", torch.ones(()))

    def adapt(self, student: Hidden, teacher: Hidden) -> None:
        maps, targets = student.layers[self.layer], teacher.layers[self.layer]
        self.regressor = nn.Conv2d(maps.shape[1], targets.shape[1], 1).to(targets.device)
        bound = 1 / math.sqrt(maps.shape[1])
        generator = torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for part in self.regressor.parameters():
                drawn = torch.rand(part.shape, generator=generator, dtype=part.dtype)
                part.copy_(bound * (2 * drawn - 1))
            self.scale.copy_(targets.float().square().mean().sqrt().clamp_min(1e-6))

    def forward(self, student: Hidden, teacher: Hidden, ids: Tensor | Ids) -> Tensor:
        maps, targets = (widened(side.layers[self.layer]) for side in (student, teacher))
        size = common_size(maps, targets)
        maps, targets = adaptive_avg_pool2d(maps, size), adaptive_avg_pool2d(targets, size)
        weight, bias = (part.to(maps) for part in self.regressor.parameters())
        return mse_loss(conv2d(maps, weight, bias), targets.detach().to(maps) / self.scale)
