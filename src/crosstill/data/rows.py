"""Rows of tables, whatever their file: what columns are called, and which rows are one image."""

from __future__ import annotations

import ast
import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from crosstill.data.base import split_name
from crosstill.data.gather import Entry, Folder
from crosstill.data.given import Given, Listing
from crosstill.errors import DataError

FILE = ("filepath", "file", "image", "file_name", "filename", "image_path")
CAPTION = ("caption", "captions", "text")
WRITTEN = "lists of captions written as one text, each read as its captions"  # a note


class Rows:
    """Collects rows that name image files: rows of one image and split become one entry.

    Args:
        given: the files of the tables.
        images: the folder of the image files; each table's own folder where it is None.
    """

    def __init__(self, given: Given, images: Path | None) -> None:
        self._given, self._images = given, images
        # (table, name of the image, split) -> entry
        self._entries: dict[tuple[str, str, str | None], Entry] = {}
        self._paths: dict[tuple[str, str], str] = {}
        self._notes: Counter[str] = Counter()

    def add(self, file: str, place: str, row: Mapping[str, Any]) -> None:
        """Take one row, under whichever of the known names its columns go.

        Raises:
            DataError: a value that does not fit; the message names the file and the place.
        """
        where = f"{self._given.base / file}, {place}"
        path = text_of(first(row, FILE), where, "filepath")
        name = label_of(row) or path
        known = self._paths.setdefault((file, name), path)
        if not known:
            columns = ", ".join(column for column in FILE if column in row)
            raise DataError(f"{where}: no image in its columns ({columns}); name its file there")
        if path not in ("", known):
            raise DataError(
                f"{where}: filepath {path!r} where image {name!r} has "
                f"{known!r}; give each image one file"
            )
        split = split_of(row, where) or self._given.split(file)
        full = known if self._images else os.path.join(os.path.dirname(file), known)
        entry = Entry(self._given.where(file, place), full, [], split)
        entry = self._entries.setdefault((file, name, split), entry)
        entry.captions.extend(captions_of(first(row, CAPTION), where, self._notes))

    def listing(self) -> Listing:
        """All rows so far as a listing of files."""
        source = Folder(self._images or self._given.base)
        given = self._given
        notes = tuple(f"{text}: {count}" for text, count in self._notes.items())
        return Listing(given.name, given.origin, source, list(self._entries.values()), notes)


def first(row: Mapping[str, Any], names: Collection[str]) -> Any:
    """The value under the first of the names that has one; else what is under the first, or None.

    An empty text or list is no value: `filename` counts where `image` is empty.
    """
    values = [row[name] for name in names if row.get(name) is not None]
    filled = (value for value in values if value != [] and not _blank(value))
    return next(filled, values[0] if values else None)


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def text_of(value: Any, where: str, key: str) -> str:
    """A text, or "" for none; `where` and `key` are for the error."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} holds {_kind(value)}; it must be text")
    return value or ""


def captions_of(value: Any, where: str, notes: Counter[str]) -> list[str]:
    """One caption or a list of them, or none; `notes` counts lists that are written as a text."""
    if isinstance(value, str) and (written := _written_list(value)) is not None:
        notes[WRITTEN] += 1
        value = written
    several = value if isinstance(value, list) else [] if value is None else [value]
    for text in several:
        if not isinstance(text, str):
            raise DataError(
                f"{where}: a caption is {_kind(text)}; a caption is text, several are a list"
            )
    return list(several)


def _written_list(text: str) -> list[str] | None:
    """The texts of a list that Python or JSON wrote, as in Flickr30k's column `raw`; else None."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            with warnings.catch_warnings():  # of backslashes in a caption
                warnings.simplefilter("ignore")
                value = parse(text)
            if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
                return value
    return None


def label_of(row: Mapping[str, Any]) -> str:
    """The user's own name for the image of a row, or ""."""
    value = row.get("image_id")
    return "" if value is None else str(value)


def split_of(row: Mapping[str, Any], where: str) -> str | None:
    """The split that a row names, or None."""
    text = text_of(row.get("split"), where, "split")
    return split_name(text, where) if text else None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the {type(value).__name__} {value!r:.40}")
