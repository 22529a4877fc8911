"""Locate the files that a user names: one, several, a pattern, a folder; and read photo folders.

A photo folder holds images, each with a text file of the same name beside it: a caption a line.
Subfolders of any depth are read; first-level ones named train, val or test are the splits.
"""

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import glob, has_magic
from itertools import product
from pathlib import Path, PurePath
from typing import NamedTuple

from crosstill import formats
from crosstill.data.collection import Entry, Folder, Listing
from crosstill.data.pairs import SPLIT_NAMES, regular, unreadable
from crosstill.errors import DataError, ImageError


class FileSet(NamedTuple):
    """Files of one dataset, relative to the folder that they have in common."""

    base: Path
    names: tuple[str, ...]

    @property
    def origin(self) -> Path:
        """The path by which messages call the dataset."""
        return self.base / self.names[0] if len(self.names) == 1 else self.base

    @property
    def name(self) -> str:
        """The name of the dataset for people."""
        return self.origin.stem if len(self.names) == 1 else self.base.name

    def where(self, file: str, place: str) -> str:
        """Return a place for messages that begin with `origin`; of several files, with its name."""
        return place if len(self.names) == 1 else f"{file}, {place}"

    def split(self, file: str) -> str | None:
        """Return the split in a file's name (coco.train.jsonl), or else its folder's: val/0.tar."""
        parts = PurePath(file).parts
        for part in (parts[-1], *parts[:-1]):
            words = re.split(r"[-_. ]", part.lower())
            splits = {SPLIT_NAMES.get(word.rstrip("0123456789")) for word in words} - {None}
            if len(splits) == 1:
                return splits.pop()
        return None


def locate(source: str) -> FileSet:
    """Find the files that a source names; of a folder, the listings or archives in it.

    Several are named with commas, wildcards, or braces such as {train,val} and {000..009}. A folder
    that holds none is returned as its own only file.

    Raises:
        DataError: nothing is there, or a pattern fits nothing; the message names it.
    """
    if os.path.isdir(source):
        folder = Path(source).absolute()
        inside = _listings_in(folder)
        return FileSet(folder, tuple(os.path.relpath(path, folder) for path in inside) or (".",))
    paths = [Path(source)] if os.path.exists(source) else list(_expand(source))
    paths = list(dict.fromkeys(path.absolute() for path in paths))
    for path in paths:
        if not path.is_file():
            kind = "a folder among files" if path.is_dir() else "no such file or folder"
            raise DataError(f"{path}: {kind}; give a dataset")
    base = os.path.commonpath([path.parent for path in paths])
    return FileSet(Path(base), tuple(os.path.relpath(path, base) for path in paths))


def _expand(source: str) -> Iterator[Path]:
    """Yield the paths that a source with commas, braces and wildcards stands for."""
    for part in re.split(r",(?![^{]*})", source):
        pieces = map(_choices, re.split(r"({[^{}]*})", part.strip()))
        for choice in product(*pieces):
            name = "".join(choice)
            pattern = has_magic(name) and not os.path.exists(name)
            paths = sorted(glob(name)) if pattern else [name]
            if not paths:
                raise DataError(f"{name}: no such file or folder; give a dataset")
            yield from map(Path, paths)


def _choices(piece: str) -> list[str]:
    """Return the texts that a piece in braces stands for; numbers keep their leading zeros."""
    if span := re.fullmatch(r"{(\d+)\.\.(\d+)}", piece):
        numbers = range(int(span[1]), int(span[2]) + 1)
        return [str(number).zfill(len(span[1])) for number in numbers]
    return piece[1:-1].split(",") if re.fullmatch(r"{.*,.*}", piece) else [piece]


# What a folder may hold instead of photos with .txt files, by the first of these that fits it
_PATTERNS = (
    ("metadata.csv", "metadata.jsonl"),
    ("captions_*.json",),
    ("*.tar",),
    ("*.parquet",),
    ("*.jsonl",),
)
_BELOW = {*SPLIT_NAMES, "data", "annotations"}  # subfolders in which they may lie


def _listings_in(folder: Path) -> list[Path]:
    if saved := _arrow_files(folder):
        return saved
    below = [folder, *(path for path in sorted(folder.iterdir()) if path.name.lower() in _BELOW)]
    for patterns in _PATTERNS:
        pairs = product(below, patterns)
        if paths := [path for place, pattern in pairs for path in _matching(place, pattern)]:
            break
    else:
        return []
    stems = {path.name.split(".")[0] for path in paths if formats.ending(path.name) == ".jsonl"}
    if len(stems) > 1:  # BEiT-3 keeps all of its tasks in one folder
        raise DataError(
            f"{folder}: .jsonl files of {', '.join(sorted(stems))}; "
            f"name those of one, such as {folder / min(stems)}.*.jsonl"
        )
    return paths


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return what a folder holds under names of a pattern, in any case, hidden ones aside."""
    if not folder.is_dir():
        return []
    paths = (path for path in sorted(folder.iterdir()) if not formats.hidden(path.name))
    return [path for path in paths if fnmatchcase(path.name.lower(), pattern)]


def _arrow_files(folder: Path) -> list[Path]:
    """Return the files that `save_to_disk` of Hugging Face's datasets wrote, of all splits."""
    paths = []
    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        if state.is_file() and (state.parent / "dataset_info.json").is_file():
            try:
                listed = json.loads(state.read_bytes())["_data_files"]
                paths += [state.parent / item["filename"] for item in listed]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{state}: not as `save_to_disk` writes it; save again") from None
    return paths


def read_photo_folder(folder: Path) -> Listing:
    """List a folder of images with captions in text files beside them.

    Raises:
        DataError: the folder cannot be read.
    """
    closed: list[OSError] = []
    names = sorted(_walk(folder, closed))
    known = formats.PHOTOS | formats.UNSUPPORTED.keys()
    images = [name for name in names if formats.ending(name) in known]
    if closed and not images:
        raise DataError(f"{closed[0].filename}: {unreadable(closed[0])}; check its permissions")
    texts = {name for name in names if formats.ending(name) == ".txt"}
    bad = [ImageError(os.path.relpath(e.filename, folder), unreadable(e)) for e in closed]
    entries, paired = [], set()
    for name in images:
        sidecar = next((text for text in formats.sidecars(name) if text in texts), "")
        captions = _captions(folder, sidecar, bad) if sidecar else []
        paired.add(sidecar)
        top = PurePath(name).parts[0]
        split = SPLIT_NAMES.get(top.lower()) if top != name else None
        entries.append(Entry(name, name, captions, split, listed=False))
    alone = len(texts - paired)
    notes = [f"text files without an image of the same name: {alone}"] if alone else []
    if not any(entry.captions for entry in entries):
        here = (name for name in names if "/" not in name)
        lists = [name for name in here if formats.ending(name) in (".json", ".csv", ".tsv")]
        if lists:
            notes.append(f"listings beside the photos, not read, such as {lists[0]}: {len(lists)}")
    return Listing(folder.name, folder, Folder(folder), entries, tuple(notes), tuple(bad))


def _captions(root: Path, sidecar: str, bad: list[ImageError]) -> list[str]:
    """Read the captions of a text file; one that cannot be read is added to `bad`."""
    content = b""
    try:
        content = regular(root / sidecar).read_bytes()
        return formats.captions(formats.decode(content, sidecar))
    except FileNotFoundError:  # it went while its neighbours were read
        return []
    except OSError as error:
        bad.append(ImageError(sidecar, unreadable(error)))
    except DataError:
        bad.append(ImageError(sidecar, formats.BAD_TEXT, len(content)))
    return []


def _walk(root: Path, closed: list[OSError]) -> Iterator[str]:
    """Yield the files below a folder, relative to it, without hidden ones.

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
