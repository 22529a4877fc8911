"""Attention transfer.

Zagoruyko and Komodakis, arXiv 1612.03928, eq. 1-2: where a layer is active, whatever its width.
Needs a teacher that runs beside the student.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts.maps import smaller
from crosstill.types import Hidden


class Loss(Objective):
    """Mean over layers and photos of the distance between unit-length attention maps.

    The map of a layer is the sum over channels of its squares. Both maps are pooled to the
    smaller one's size first.

    Args:
        layers: which blocks of each image tower: "first", "middle", "last" or numbers.
    """

    reads = "hidden"
    needs = frozenset[str]()

    def __init__(self, *, layers: Sequence[str | int] = ("middle", "last")) -> None:
        super().__init__()
        if not layers:
            raise ConfigError("layers is empty; name one or more")
        self.layers = tuple(map(str, layers))

    def forward(self, student: Hidden, teacher: Hidden, ids: Tensor) -> Tensor:
        terms = [
            distance(student.layers[layer], teacher.layers[layer].detach()) for layer in self.layers
        ]
        return sum(terms, start=terms[0].new_zeros(())) / len(terms)


def attention(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Unit rows (B, H * W) of where maps (B, C, h, w) are active, pooled to `size`."""
    wide = maps if maps.dtype.itemsize >= 4 else maps.float()
    return normalize(adaptive_avg_pool2d(wide.square().sum(1), size).flatten(1), dim=1)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Euclidean distance between the attention of maps (B, C, H, W), widths may differ."""
    size = smaller(student, teacher)
    difference = attention(student, size) - attention(teacher, size)
    # the root has no gradient at 0, where there is nothing to learn
    return difference.square().sum(1).clamp_min(1e-12).sqrt().mean()
