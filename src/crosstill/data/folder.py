"""A folder of images, each with a text file of the same name beside it: a caption a line.

Subfolders of any depth are read; first-level ones named train, val or test are the splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from crosstill import formats
from crosstill.data.base import SPLIT_NAMES, regular, unreadable
from crosstill.data.gather import Entry, Folder
from crosstill.data.given import Listing
from crosstill.errors import DataError, ImageError


def read(path: Path) -> Listing:
    """List a folder of images with captions in sidecar files.

    Raises:
        DataError: the folder cannot be read.
    """
    closed: list[OSError] = []
    found = sorted(_walk(path, closed))
    known = formats.PHOTOS | formats.UNSUPPORTED.keys()
    images = [name for name in found if formats.ending(name) in known]
    if closed and not images:
        raise DataError(f"{closed[0].filename}: {unreadable(closed[0])}; check its permissions")
    texts = {name for name in found if formats.ending(name) == ".txt"}
    bad = [ImageError(os.path.relpath(e.filename, path), unreadable(e)) for e in closed]
    entries, paired = [], set()
    for name in images:
        sidecar = next((text for text in formats.sidecars(name) if text in texts), "")
        captions = _captions(path, sidecar, bad) if sidecar else []
        paired.add(sidecar)
        top = PurePath(name).parts[0]
        split = SPLIT_NAMES.get(top.lower()) if top != name else None
        entries.append(Entry(name, name, captions, split, listed=False))
    alone = len(texts - paired)
    notes = (f"text files without an image of the same name: {alone}",) if alone else ()
    return Listing(path.name, path, Folder(path), entries, notes, tuple(bad))


def _captions(root: Path, sidecar: str, bad: list[ImageError]) -> list[str]:
    """The captions of a text file; one that cannot be read is added to `bad`."""
    data = b""
    try:
        data = regular(root / sidecar).read_bytes()
        return formats.captions(formats.decode(data, sidecar))
    except FileNotFoundError:  # it went while its neighbours were read
        return []
    except OSError as error:
        bad.append(ImageError(sidecar, unreadable(error)))
    except DataError:
        bad.append(ImageError(sidecar, formats.BAD_TEXT, len(data)))
    return []


def _walk(root: Path, closed: list[OSError]) -> Iterator[str]:
    """Files below a folder, relative to it, without hidden ones.

    Links are followed, but no folder is entered twice.
    """
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
        subfolders[:] = sorted(name for name in subfolders if not formats.hidden(name))
        visible = (name for name in names if not formats.hidden(name))
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in visible)
