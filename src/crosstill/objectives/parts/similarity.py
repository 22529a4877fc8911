"""Dot products of embeddings, never in less than float32."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """All dot products of the rows of a (A, D) and b (B, D): (A, B), float32 or wider.

    Eight bits of mantissa, divided by a temperature of 0.05, would move a logit by 0.08.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ b.to(wide).T
