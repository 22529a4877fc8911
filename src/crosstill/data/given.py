"""The files that a user names: one, several, a pattern, or those that a folder holds."""

from __future__ import annotations

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
from crosstill.data.base import SPLIT_NAMES
from crosstill.data.gather import Entry, Source
from crosstill.errors import DataError, ImageError


class Given(NamedTuple):
    """Files of one dataset, relative to the folder that they have in common."""

    base: Path
    files: tuple[str, ...]

    @property
    def origin(self) -> Path:
        """What messages call the dataset."""
        return self.base / self.files[0] if len(self.files) == 1 else self.base

    @property
    def name(self) -> str:
        """What people call the dataset."""
        return self.origin.stem if len(self.files) == 1 else self.base.name

    def where(self, file: str, place: str) -> str:
        """A place in a file, said after `origin`: the file is named where there are several."""
        return place if len(self.files) == 1 else f"{file}, {place}"

    def split(self, file: str) -> str | None:
        """The split that a file's name says (coco.train.jsonl), or else its folder's: val/0.tar."""
        parts = PurePath(file).parts
        for part in (parts[-1], *parts[:-1]):
            words = re.split(r"[-_. ]", part.lower())
            told = {SPLIT_NAMES.get(word.rstrip("0123456789")) for word in words} - {None}
            if len(told) == 1:
                return told.pop()
        return None


class Listing(NamedTuple):
    """What a form's reader found: what `gather` needs, and what it could not even list."""

    name: str
    origin: Path
    source: Source
    entries: list[Entry]
    notes: tuple[str, ...] = ()
    bad: tuple[ImageError, ...] = ()
    licence: str | None = None


def files_of(source: str) -> Given:
    """The files that a source names; of a folder, the listings or archives in it.

    Several are named with commas, wildcards, or braces such as {train,val} and {000..009}. A folder
    that holds none is returned as its own only file.

    Raises:
        DataError: nothing is there, or a pattern fits nothing; the message names it.
    """
    if os.path.isdir(source):
        folder = Path(source).absolute()
        inside = _inside(folder)
        return Given(folder, tuple(os.path.relpath(path, folder) for path in inside) or (".",))
    paths = [Path(source)] if os.path.exists(source) else list(_expand(source))
    paths = list(dict.fromkeys(path.absolute() for path in paths))
    for path in paths:
        if not path.is_file():
            kind = "a folder among files" if path.is_dir() else "no such file or folder"
            raise DataError(f"{path}: {kind}; give a dataset")
    base = os.path.commonpath([path.parent for path in paths])
    return Given(Path(base), tuple(os.path.relpath(path, base) for path in paths))


def _expand(source: str) -> Iterator[Path]:
    for part in re.split(r",(?![^{]*})", source):
        for name in _braced(part.strip()):
            found = sorted(glob(name)) if has_magic(name) and not os.path.exists(name) else [name]
            if not found:
                raise DataError(f"{name}: no such file or folder; give a dataset")
            yield from map(Path, found)


def _braced(pattern: str) -> Iterator[str]:
    """What a pattern with braces stands for; numbers keep their leading zeros."""
    pieces = [_choices(piece) for piece in re.split(r"({[^{}]*})", pattern)]
    yield from ("".join(choice) for choice in product(*pieces))


def _choices(piece: str) -> list[str]:
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


def _inside(folder: Path) -> list[Path]:
    if saved := _arrow_files(folder):
        return saved
    below = [folder, *(path for path in sorted(folder.iterdir()) if path.name.lower() in _BELOW)]
    for patterns in _PATTERNS:
        pairs = product(below, patterns)
        if found := [path for where, pattern in pairs for path in _matching(where, pattern)]:
            break
    else:
        return []
    stems = {path.name.split(".")[0] for path in found if formats.ending(path.name) == ".jsonl"}
    if len(stems) > 1:  # BEiT-3 keeps all of its tasks in one folder
        raise DataError(
            f"{folder}: .jsonl files of {', '.join(sorted(stems))}; "
            f"name those of one, such as {folder / min(stems)}.*.jsonl"
        )
    return found


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Return what a folder holds under names of a pattern, in any case, hidden ones aside."""
    if not folder.is_dir():
        return []
    paths = (path for path in sorted(folder.iterdir()) if not formats.hidden(path.name))
    return [path for path in paths if fnmatchcase(path.name.lower(), pattern)]


def _arrow_files(folder: Path) -> list[Path]:
    """What `save_to_disk` of Hugging Face's datasets wrote, one split or several."""
    found = []
    for state in (folder / "state.json", *sorted(folder.glob("*/state.json"))):
        if state.is_file() and (state.parent / "dataset_info.json").is_file():
            try:
                listed = json.loads(state.read_bytes())["_data_files"]
                found += [state.parent / item["filename"] for item in listed]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{state}: not as `save_to_disk` writes it; save again") from None
    return found
