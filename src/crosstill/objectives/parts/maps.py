"""Spatial maps of two towers that see photos at different sizes."""

from __future__ import annotations

from torch import Tensor


def smaller(a: Tensor, b: Tensor) -> tuple[int, int]:
    """The height and width to which (B, C, H, W) maps can both be pooled."""
    return min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
