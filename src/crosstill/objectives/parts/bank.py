"""The memory of one teacher embedding per training image that an instance loss draws from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from crosstill.errors import ConfigError
from crosstill.objectives.parts.named import positive
from crosstill.types import Features


class Bank(nn.Module):
    """I image and I text embeddings, float32, one row of each for an image.

    It starts as random unit vectors. At I = 113,000 and D = 512 it takes 463 MB.

    Buffers:
        entries: (2, I, D) image rows, then text rows.
        keys: (I,) int64, whose row it is, ascending.
    """

    entries: Tensor
    keys: Tensor

    def __init__(self, keys: Tensor, dim: int, seed: int) -> None:
        super().__init__()
        positive(dim=dim)
        if not len(keys):
            raise ConfigError("keys is empty; give the keys of all training images")
        generator = torch.Generator().manual_seed(seed)
        owners = keys.unique()
        noise = torch.randn(2, len(owners), dim, generator=generator)
        self.register_buffer("entries", normalize(noise, dim=-1))
        self.register_buffer("keys", owners)

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, ids: Tensor) -> Tensor:
        """The row of each id: (B,) int64.

        Raises:
            ConfigError: an id has no row.
        """
        rows = torch.searchsorted(self.keys, ids).clamp_max(len(self) - 1)
        if (strange := self.keys[rows] != ids).any():
            raise ConfigError(
                f"the bank has no row for image key {int(ids[strange][0])}; "
                "give the loss the keys of all training images"
            )
        return rows

    @torch.no_grad()
    def blend(self, features: Features, rows: Tensor, momentum: float) -> None:
        """Move rows towards a batch: momentum · old + (1 - momentum) · new, made unit again.

        An image that occurs several times moves once, towards the mean of its occurrences.

        Args:
            features: (B, D) image and text.
            rows: (B,) where they belong.
            momentum: how much of the old row stays.
        """
        moved, place = rows.unique(return_inverse=True)
        # a product, for index_add on a GPU sums in no fixed order
        shares = (place == torch.arange(len(moved), device=rows.device)[:, None]).to(self.entries)
        shares = shares / shares.sum(1, keepdim=True)
        with torch.autocast(rows.device.type, enabled=False):
            new = torch.stack([shares @ side.to(self.entries) for side in features])
        mixed = momentum * self.entries[:, moved] + (1 - momentum) * new
        self.entries[:, moved] = normalize(mixed, dim=-1)


def draw(seed: int, step: int, count: int, length: int) -> Tensor:
    """`count` rows of a bank of `length`, with replacement: (count,) int64.

    A pure function of its arguments: the same in every process and after a restart.
    """
    random = np.random.default_rng([seed, step])
    return torch.from_numpy(random.integers(length, size=count))
