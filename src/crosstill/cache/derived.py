"""What can be computed from a cache again, kept beside it so that nobody has to.

Decoded photos, a frozen tower's outputs and a head start are the same for every run of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosstill import artefacts, files
from crosstill.cache.store import FORMAT, Listing
from crosstill.errors import CorruptError


def kept(
    cache: Listing, name: str, write: Callable[[Path], object], needed: int | None = None
) -> Path:
    """The `.npy` file of that name, written if it is not there whole.

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


def rows(cache: Listing, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """As `kept`, for a tensor that fits into memory: on the CPU, in its own type."""

    def write(path: Path) -> None:
        files.save_array(path, compute().cpu().numpy())

    return torch.from_numpy(np.load(kept(cache, name, write), allow_pickle=False))


def new_array(path: Path, kind: type[np.generic], shape: tuple[int, ...]) -> np.memmap:
    """A .npy file of zeros to fill in any order, larger than memory if need be; flush it."""
    with path.open("wb") as file:  # open_memmap would insist on the suffix .npy
        described = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, described)
        offset = file.tell()
        files.allocate(file, offset + math.prod(shape) * np.dtype(kind).itemsize)
    return np.memmap(path, dtype=kind, mode="r+", offset=offset, shape=shape)


def _usable(path: Path) -> bool:
    """Whether the array is whole; what is damaged can be made again, so it only says no."""
    record = path.with_suffix(".json")
    try:
        if not (artefacts.member(path.parent, path.name).is_file() and record.is_file()):
            return False
        files.check_digest(path, files.read_sealed(record, {FORMAT})["sha256_of_data"])
    except CorruptError:
        return False
    return True
