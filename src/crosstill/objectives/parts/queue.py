"""The memory of past teacher embeddings that a contrastive loss draws its negatives from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from crosstill.objectives.parts.named import positive
from crosstill.types import Features

NOBODY = -1  # the id of a random vector; ids of images are never negative


class Queue(nn.Module):
    """First in, first out: K image and K text embeddings with the ids of their images.

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
        self.register_buffer("entries", functional.normalize(noise, dim=-1))
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
