"""Antialiased resizing in numpy: the pixels of torch's uint8 kernel, bit for bit, without torch.

Weights are rounded to 16-bit integers, and the pixels to 8 bits after either axis, width first.
Sums of such integers are exact in floating point, so that a matrix product serves.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_REACH = {"bilinear": 1.0, "bicubic": 2.0}  # of the filter, in pixels of the smaller image
_STRIP = 256  # rows of the source whose width is resized at a time: a large photo need not be held
_BLOCK = 16  # rows of the result that share one product; few, since most weights are zero
_EXACT = 2**24  # float32 holds every integer up to here


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an image with the antialiased filter.

    Args:
        pixels: uint8 (H, W, C).
        size: height and width of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 (*size, C).
    """
    height, width = size
    if pixels.shape[1] != width:
        strips = [pixels[at : at + _STRIP] for at in range(0, len(pixels), _STRIP)]
        done = [_turned(_along_rows(_turned(strip), width, interpolation)) for strip in strips]
        pixels = np.concatenate(done) if len(done) > 1 else done[0]
    if pixels.shape[0] != height:
        pixels = _along_rows(pixels, height, interpolation)
    return pixels


def _turned(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, M, C) → (M, N, C). Four channels move as one number, several times as fast."""
    if pixels.shape[2] == 4 and pixels.flags.c_contiguous:
        words = pixels.view(np.uint32)[:, :, 0]
        return np.ascontiguousarray(words.T)[:, :, None].view(np.uint8)
    return np.ascontiguousarray(pixels.swapaxes(0, 1))


def _along_rows(pixels: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """uint8 (N, M, C) → (size, M, C)."""
    blocks = _blocks(pixels.shape[0], size, interpolation)
    rows = pixels.astype(blocks[0][1].dtype, order="C").reshape(len(pixels), -1)
    out = np.empty((size, rows.shape[1]), rows.dtype)
    for at, (first, weights) in zip(range(0, size, _BLOCK), blocks, strict=True):
        np.matmul(weights, rows[first : first + weights.shape[1]], out=out[at : at + _BLOCK])
    out += 0.5
    # what is not negative is rounded down by the conversion itself
    return np.clip(out, 0, 255, out=out).astype(np.uint8).reshape(size, *pixels.shape[1:])


@lru_cache(256)
def _blocks(source: int, target: int, interpolation: str) -> list[tuple[int, np.ndarray]]:
    """For every `_BLOCK` rows of the result: the first row read, and the weights from there on.

    They are integers over a power of two, the greatest at which the largest fits 16 bits, 2**22 at
    most. Dividing by it changes no digit, so that sums are as exact as those of the integers.
    """
    rows = [_row(i, source, target, interpolation) for i in range(target)]
    top = max(weights.max() for _, weights in rows)
    precision = 0
    while precision < 22 and int(0.5 + top * 2 ** (precision + 1)) < 2**15:
        precision += 1
    blocks = [_block(rows[at : at + _BLOCK], precision) for at in range(0, target, _BLOCK)]
    greatest = max(np.abs(block).sum(axis=1).max() for _, block in blocks) * 255 + 2**precision
    kind = np.float32 if greatest < _EXACT else np.float64
    return [(first, (block * 2.0**-precision).astype(kind)) for first, block in blocks]


def _row(i: int, source: int, target: int, interpolation: str) -> tuple[int, np.ndarray]:
    """The first source pixel that row i of the result reads, and the weights from there on."""
    scale = source / target
    wide = max(scale, 1.0)
    centre, reach = scale * (i + 0.5), _REACH[interpolation] * wide
    first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), source)
    weights = _filter(np.abs(np.arange(first, last) - centre + 0.5) / wide, interpolation)
    return first, weights / weights.sum()


def _block(rows: list[tuple[int, np.ndarray]], precision: int) -> tuple[int, np.ndarray]:
    first = min(at for at, _ in rows)
    last = max(at + len(weights) for at, weights in rows)
    block = np.zeros((len(rows), last - first))
    for line, (at, weights) in zip(block, rows, strict=True):
        scaled = weights * 2**precision
        line[at - first : at - first + len(weights)] = np.trunc(scaled + np.copysign(0.5, scaled))
    return first, block


def _filter(x: np.ndarray, interpolation: str) -> np.ndarray:
    """The filter's value at distances x >= 0; the cubic is Keys' with a = -0.5."""
    if interpolation == "bilinear":
        return np.clip(1 - x, 0, None)
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
