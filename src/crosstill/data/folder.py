"""A folder of images, each with a text file of the same name beside it: a caption a line.

Subfolders of any depth are read; first-level ones named train, val or test are the splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from crosstill.data.base import SPLIT_NAMES, read_text, unreadable
from crosstill.data.gather import Entry, Folder
from crosstill.data.given import Listing
from crosstill.errors import DataError, ImageError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_OTHERS = (".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
SUFFIXES = frozenset((*_JPEG, *_OTHERS))


def read(path: Path) -> Listing:
    """List a folder of images with captions in sidecar files.

    Raises:
        DataError: a folder or a caption file that cannot be read.
    """
    closed: list[OSError] = []
    found = sorted(_walk(path, closed))
    images = [name for name in found if PurePath(name).suffix.lower() in SUFFIXES]
    if closed and not images:
        raise DataError(f"{closed[0].filename}: {unreadable(closed[0])}; check its permissions")
    texts = {name for name in found if name.endswith(".txt")}
    entries = [_entry(path, name, texts) for name in images]
    bad = tuple(ImageError(os.path.relpath(e.filename, path), unreadable(e)) for e in closed)
    alone = len(texts - {_sidecar(name) for name in images})
    notes = (f"text files without an image of the same name: {alone}",) if alone else ()
    return Listing(path.name, path, Folder(path), entries, notes, bad)


def _walk(root: Path, closed: list[OSError]) -> Iterator[str]:
    """Files below a folder, relative to it; links are followed, but no folder is entered twice."""
    entered = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=closed.append):
        try:
            status = os.stat(folder)
        except OSError as error:  # it went while its neighbours were read
            closed.append(error)
            continue
        if (status.st_dev, status.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        subfolders.sort()
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names)


def _sidecar(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def _entry(root: Path, name: str, texts: set[str]) -> Entry:
    sidecar = _sidecar(name)
    captions = read_text(root / sidecar, gone="").splitlines() if sidecar in texts else []
    top = PurePath(name).parts[0]
    split = SPLIT_NAMES.get(top.lower()) if top != name else None
    return Entry(name, name, [line for line in captions if line.strip()], split, listed=False)
