"""Attention transfer.

Zagoruyko and Komodakis, arXiv 1612.03928, eq. 1-2: the student is active where the teacher is,
whatever the widths of their layers.
Needs a teacher that runs beside the student.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from crosstill.errors import ConfigError
from crosstill.objectives.base import Input, Objective
from crosstill.objectives.parts import widened
from crosstill.types import Hidden, Ids


class AttentionTransfer(Objective):
    """Mean over layers and photos of the distance between unit-length attention maps.

    The map of a layer is the sum over channels of its squares. Both maps are pooled to the
    smaller one's size first.

    Args:
        layers: which blocks of each image tower: "first", "middle", "last" or numbers.
    """

    needs = frozenset[str]()
    pairs = False

    def __init__(self, *, layers: Sequence[str | int] = ("middle", "last")) -> None:
        super().__init__()
        if not layers:
            raise ConfigError("layers is empty; name one or more")
        self.reads = Input("hidden", layers=tuple(map(str, layers)))

    def forward(self, student: Hidden, teacher: Hidden, ids: Tensor | Ids) -> Tensor:
        terms = [
            distance(student.layers[layer], teacher.layers[layer].detach())
            for layer in self.reads.layers
        ]
        return sum(terms, start=terms[0].new_zeros(())) / len(terms)


def common_size(a: Tensor, b: Tensor) -> tuple[int, int]:
    """Return the height and width to which (B, C, H, W) maps can both be pooled."""
    return min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])


def attention(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool the activity of maps (B, C, h, w) to `size`, as unit rows (B, H * W)."""
    return normalize(adaptive_avg_pool2d(widened(maps).square().sum(1), size).flatten(1), dim=1)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean distance between the attention of maps (B, C, H, W) of any widths C."""
    size = common_size(student, teacher)
    difference = attention(student, size) - attention(teacher, size)
    # the root has no gradient at 0, where there is nothing to learn
    return difference.square().sum(1).clamp_min(1e-12).sqrt().mean()
