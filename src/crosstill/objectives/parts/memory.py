"""Memories of teacher embeddings that losses draw negatives from.

`Queue` holds the newest rows of any images, `Bank` one row of each training image.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from crosstill.errors import ConfigError
from crosstill.plugins import positive
from crosstill.types import Features

NOBODY = -1  # the id of a random vector; ids of images are never negative


class Queue(nn.Module):
    """Keep the newest K image and K text embeddings with the ids of their images.

    It starts as random unit vectors, is float32, and takes batches of any size.

    Buffers:
        entries: (2, K, D) image rows, then text rows.
        ids: (K,) int64, `NOBODY` for the random start.
        pointer: () int64, the oldest slot, which is the next to be overwritten.
    """

    entries: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, length: int, dim: int, seed: int) -> None:
        super().__init__()
        positive(queue_size=length, dim=dim)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, length, dim, generator=generator)
        self.register_buffer("entries", normalize(noise, dim=-1))
        self.register_buffer("ids", torch.full((length,), NOBODY))
        self.register_buffer("pointer", torch.tensor(0))

    @torch.no_grad()
    def push(self, features: Features, ids: Tensor) -> None:
        """Overwrite the oldest slots; of a batch longer than the queue the last rows stay."""
        length = len(self.ids)
        rows = torch.stack([x[-length:].to(self.entries) for x in features])
        count = rows.shape[1]
        slots = (self.pointer + torch.arange(count, device=self.ids.device)) % length
        self.entries[:, slots] = rows
        self.ids[slots] = ids[-length:].to(self.ids)
        self.pointer.copy_((self.pointer + count) % length)


class Bank(nn.Module):
    """Keep one image row and one text row, float32, for each of I images.

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
        """Return the row of each id: (B,) int64.

        Raises:
            ConfigError: an id has no row.
        """
        rows = torch.searchsorted(self.keys, ids).clamp_max(len(self) - 1)
        if (unknown := self.keys[rows] != ids).any():
            raise ConfigError(
                f"the bank has no row for image key {int(ids[unknown][0])}; "
                "give the loss the keys of all training images"
            )
        return rows

    @torch.no_grad()
    def blend(self, features: Features, rows: Tensor, momentum: float) -> None:
        """Move rows towards a batch: momentum · old + (1 - momentum) · new, made unit again.

        An image that occurs several times moves once, towards the mean of its occurrences.

        Args:
            features: (B, D) image and text.
            rows: (B,) their rows in the bank.
            momentum: share of the old row that stays.
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
    """Draw `count` rows of a bank of `length`, with replacement: (count,) int64.

    A pure function of its arguments: the same in every process and after a restart.
    """
    random = np.random.default_rng([seed, step])
    return torch.from_numpy(random.integers(length, size=count))
