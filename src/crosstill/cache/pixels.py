"""Photos decoded once, at a student's size, as memory-mapped uint8.

An epoch then reads pixels at the speed of memory and never decodes. With several views an
image, each is stored as the teacher saw it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosstill import decoding, images, progress
from crosstill.cache import derived
from crosstill.cache.store import Listing, Split


class PixelStore:
    """Pixels of one split: `take(positions, view)` gives uint8 (B, 3, H, W)."""

    def __init__(self, array: np.ndarray, views: int) -> None:
        self._array = array
        self._views = views

    def __len__(self) -> int:
        return len(self._array) // self._views

    def take(self, positions: np.ndarray, view: int | np.ndarray = 0) -> Tensor:
        """Pixels of images at `positions` of the split, in that order."""
        return torch.from_numpy(self._array[np.asarray(positions) * self._views + view])


def pixels(cache: Listing, split: Split, preprocess: images.Preprocess) -> PixelStore:
    """Open the decoded photos of a split, decoding them first if that was never done.

    Raises:
        DataError: a photo is no longer where the cache found it.
        DiskFullError: the disk of the cache has no room for the pixels.
        MismatchError: a photo's bytes are not those that the teacher saw.
    """
    name = f"{preprocess.digest()[:16]}-{split.name}"
    size = math.prod((len(split.images), cache.views, 3, *preprocess.size))
    path = derived.kept(cache, name, lambda new: _decode(new, cache, split, preprocess), size)
    return PixelStore(np.load(path, mmap_mode="r", allow_pickle=False), cache.views)


def _decode(path: Path, cache: Listing, split: Split, preprocess: images.Preprocess) -> None:
    shape = (len(split.images) * cache.views, 3, *preprocess.size)
    out = derived.new_array(path, np.uint8, shape)
    fill = _filler(out, cache, split, preprocess)
    count = len(split.images)
    with decoding.in_threads() as pool, progress.bar("decoding", count) as bar:
        for _ in pool.map(fill, range(count)):
            bar.advance()
    out.flush()


def _filler(
    out: np.ndarray, cache: Listing, split: Split, preprocess: images.Preprocess
) -> Callable[[int], None]:
    def fill(position: int) -> None:
        row = int(split.images[position])
        data = cache.photo(row)
        for view in range(cache.views):
            seen = images.load(data, cache.paths[row], preprocess, cache.view(row, view))
            out[position * cache.views + view] = seen.numpy()

    return fill
