"""Arrays that are computed from a cache once and kept in its folder, decoded photos among them.

Decoded photos, outputs of frozen towers and ridge heads are the same for every run of a grid.
Photos are kept at a student's size as memory-mapped uint8, each view as the teacher saw it: an
epoch then reads pixels at the speed of memory and never decodes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosstill import artefacts, decoding, files, images, progress
from crosstill.cache.format import FORMAT, CacheBase, Split
from crosstill.errors import CorruptError


def memoised(
    cache: CacheBase, name: str, write: Callable[[Path], object], needed: int | None = None
) -> Path:
    """Return the `.npy` file of a name in the cache's folder; write it if it is not there whole.

    A second process that wants the same array waits for the first.

    Args:
        cache: what the array is derived from.
        name: names all that decides the content.
        write: puts the array into the path that it is given.
        needed: bytes of the array, where that is known.

    Raises:
        DiskFullError: the disk of the cache has no room for it.
    """
    folder = files.writable_folder(artefacts.member(cache.folder, "pixels"))
    path = folder / f"{name}.npy"
    if _usable(path):
        return path
    # one lock a name, because computing one array may ask for another
    with files.locked(folder, wait=True, name=f".{name}.lock"):
        if not _usable(path):
            files.sweep(folder, path.name)
            files.write_atomic(path, write, needed)
            record = {"format": FORMAT, "sha256_of_data": files.digest_file(path)}
            files.write_json(path.with_suffix(".json"), files.sealed(record))
    return path


def memoised_tensor(cache: CacheBase, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return a tensor by its name, computed if it is not kept: on the CPU, in its own type."""

    def write(path: Path) -> None:
        files.save_array(path, compute().cpu().numpy())

    return torch.from_numpy(np.load(memoised(cache, name, write), allow_pickle=False))


def new_array(path: Path, kind: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    """Make a .npy file of zeros to fill in any order, larger than memory if need be; flush it."""
    with path.open("wb") as file:  # open_memmap would insist on the suffix .npy
        header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
        files.allocate(file, offset + math.prod(shape) * np.dtype(kind).itemsize)
    return np.memmap(path, dtype=kind, mode="r+", offset=offset, shape=shape)


def _usable(path: Path) -> bool:
    """Tell whether an array is there and whole; a damaged one is made again."""
    record = path.with_suffix(".json")
    try:
        if not (artefacts.member(path.parent, path.name).is_file() and record.is_file()):
            return False
        files.check_digest(path, files.read_sealed(record, {FORMAT})["sha256_of_data"])
    except CorruptError:
        return False
    return True


class PixelStore:
    """Decoded photos of one split, some of them at a time: uint8 (B, 3, H, W)."""

    def __init__(self, array: np.ndarray, views: int) -> None:
        self._array = array
        self._views = views

    def __len__(self) -> int:
        return len(self._array) // self._views

    def take(self, positions: np.ndarray, view: int | np.ndarray = 0) -> Tensor:
        """Read the pixels of images at `positions` of the split, in that order."""
        return torch.from_numpy(self._array[np.asarray(positions) * self._views + view])


def pixels(cache: CacheBase, split: Split, preprocess: images.Preprocess) -> PixelStore:
    """Open the decoded photos of a split, decoding them first if that was never done.

    Raises:
        DataError: a photo is no longer where the cache found it.
        DiskFullError: the disk of the cache has no room for the pixels.
        MismatchError: a photo's bytes are not those that the teacher saw.
    """
    name = f"{preprocess.digest()[:16]}-{split.name}"
    size = math.prod((len(split.images), cache.views, 3, *preprocess.size))
    path = memoised(cache, name, lambda new: _decode(new, cache, split, preprocess), size)
    return PixelStore(np.load(path, mmap_mode="r", allow_pickle=False), cache.views)


def _decode(path: Path, cache: CacheBase, split: Split, preprocess: images.Preprocess) -> None:
    count = len(split.images)
    out = new_array(path, np.uint8, (count * cache.views, 3, *preprocess.size))

    def fill(position: int) -> None:
        row = int(split.images[position])
        photo = cache.photo(row)
        for view in range(cache.views):
            pixels = images.load(photo, cache.paths[row], preprocess, cache.view(row, view))
            out[position * cache.views + view] = pixels.numpy()

    with progress.bar("decoding", count) as bar:
        for _ in decoding.ahead(fill, range(count), window=64):
            bar.advance()
    out.flush()
