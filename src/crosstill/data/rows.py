"""Rows of tables, whatever their file: what columns are called, and which rows are one image."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from crosstill.data.base import split_name
from crosstill.data.gather import Entry, Folder
from crosstill.data.given import Given, Listing
from crosstill.errors import DataError

FILE = ("filepath", "file", "image", "file_name", "filename", "image_path")
CAPTION = ("caption", "captions", "text")


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

    def add(self, file: str, place: str, row: Mapping[str, Any]) -> None:
        """Take one row, under whichever of the known names its columns go.

        Raises:
            DataError: a value that does not fit; the message names the file and the place.
        """
        where = f"{self._given.base / file}, {place}"
        path = text_of(first(row, FILE), where, "filepath")
        name = label_of(row) or path
        known = self._paths.setdefault((file, name), path)
        if path not in ("", known) or not known:
            raise DataError(
                f"{where}: filepath {path!r} where image {name!r} has "
                f"{known!r}; give each image one file"
            )
        split = split_of(row, where) or self._given.split(file)
        full = known if self._images else os.path.join(os.path.dirname(file), known)
        entry = Entry(self._given.where(file, place), full, [], split)
        entry = self._entries.setdefault((file, name, split), entry)
        entry.captions.extend(captions_of(first(row, CAPTION), where))

    def listing(self) -> Listing:
        """All rows so far as a listing of files."""
        source = Folder(self._images or self._given.base)
        given = self._given
        return Listing(given.name, given.origin, source, list(self._entries.values()))


def first(row: Mapping[str, Any], names: Collection[str]) -> Any:
    """The value under the first of the names that the row has, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def text_of(value: Any, where: str, key: str) -> str:
    """A text, or "" for none; `where` and `key` are for the error."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} holds {_kind(value)}; it must be text")
    return value or ""


def captions_of(value: Any, where: str) -> list[str]:
    """One caption or a list of them, or none."""
    several = value if isinstance(value, list) else [] if value is None else [value]
    for text in several:
        if not isinstance(text, str):
            raise DataError(
                f"{where}: a caption is {_kind(text)}; a caption is text, several are a list"
            )
    return list(several)


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
