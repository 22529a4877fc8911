"""Parquet and Arrow files with image bytes in them, as the Hugging Face hub and library keep them.

A row is an image, or an image and one caption: a column `image` (bytes, or a struct of `bytes`
and `path`), `caption`, `captions` or `text` (a text or a list), and if you like `split`,
`filename` and `image_id`. A file's name may say the split: train-00000-of-00004.parquet.

Opening is one pass, a few rows in memory at a time. Where a column is not compressed, as in Arrow
files and in what Hugging Face's datasets write, every image is afterwards one read at its offset.
In compressed Parquet it costs decoding its row group.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from crosstill.data.containers import ArrowFile, Finder, ParquetFile
from crosstill.data.gather import Entry, Folder, Source
from crosstill.data.given import Given, Listing
from crosstill.data.packed import Packed, image_bytes, row_path, slice_path
from crosstill.data.rows import CAPTION, FILE, captions_of, first, label_of, split_of
from crosstill.errors import DataError, ImageError

LARGE = 2**26  # bytes of a compressed row group from which reading at random is slow


def read(given: Given, images: Path | None, splits: Mapping[str, str] | None = None) -> Listing:
    """List the rows of Parquet or Arrow files, in one pass over their bytes.

    Args:
        given: the files.
        images: the folder of images that rows name by path and do not hold.
        splits: of files, where their names do not say.

    Raises:
        DataError: no such file, a missing column, or a value that does not fit.
    """
    listed = _Rows(given, images, splits or {})
    for file in given.files:
        try:
            listed.add_file(file)
        except (OSError, pa.ArrowException) as error:
            told = " ".join(str(error).split())
            raise DataError(
                f"{given.base / file}: cannot be read ({told:.150}); write or download it again"
            ) from None
    return listed.listing()


class _Rows:
    """What the pass has found so far."""

    def __init__(self, given: Given, images: Path | None, splits: Mapping[str, str]) -> None:
        self._given, self._images, self._splits = given, images, splits
        self._source = Packed(given.base)
        # (id of the image, what the dataset calls it, split) -> entry
        self._entries: dict[tuple[str, str, str | None], Entry] = {}
        self._bad: list[ImageError] = []
        self._slow = 0
        self._notes: Counter[str] = Counter()

    def listing(self) -> Listing:
        given, megabytes = self._given, self._slow >> 20
        source, entries = self._sourced()
        notes = [f"{text}: {count}" for text, count in self._notes.items()]
        if self._slow >= LARGE:
            notes.append(
                f"compressed row groups of up to {megabytes} MB, slow to read at random; "
                "write the image column without compression"
            )
        bad = tuple(self._bad)
        return Listing(given.name, given.origin, source, entries, tuple(notes), bad)

    def _sourced(self) -> tuple[Source, list[Entry]]:
        """What holds the images: these files, or, where they hold none, a folder of files."""
        root, entries = self._images or self._given.base, list(self._entries.values())
        if not self._source.found:
            return Folder(root), entries
        alone = (entry.path not in self._source.found for entry in entries)
        return self._source, [
            entry._replace(path=str(root / entry.path)) if by_name else entry
            for entry, by_name in zip(entries, alone, strict=True)
        ]

    def add_file(self, file: str) -> None:
        path, number = self._given.base / file, 0
        opened = ArrowFile(path) if path.suffix.lower() == ".arrow" else ParquetFile(path)
        names = _columns(opened.schema, path)
        if self._source.column not in ("", names[0]):
            raise DataError(
                f"{path}: its images are in column {names[0]}, those before in "
                f"{self._source.column}; name them alike"
            )
        self._source = Packed(self._given.base, names[0], self._source.found)
        with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
            for group, cells in opened.groups(_wanted(opened.schema, names)):
                finder = Finder(view, *opened.span(group, names[0]))
                for place, row in enumerate(cells):
                    self._add(file, number, row, names, (finder, group, place))
                    number += 1
        self._slow = max(self._slow, opened.slow)

    def _add(
        self,
        file: str,
        number: int,
        row: dict[str, Any],
        names: list[str],
        at: tuple[Finder, int, int],
    ) -> None:
        where = f"{self._given.base / file}, row {number}"
        cell, name = row[names[0]], _name(row, names[0])
        data = image_bytes(cell)
        if data is None and not name:
            self._bad.append(ImageError(f"{file}, row {number}", "no image in its column"))
            return
        value = first(row, CAPTION)
        if value is None:
            value = [row[name] for name in names[1:] if row.get(name) and name not in CAPTION]
        captions = captions_of(value, where, self._notes)
        split = split_of(row, where) or self._splits.get(file) or self._given.split(file)
        if data is None:
            path = identity = name if self._images else str(Path(file).parent / name)
        else:
            path = self._path(file, data, name.lstrip("/") or str(number), at)
            identity = self._source.note(path, data)
        # rows of one caption each may repeat an image that has no name
        label = label_of(row) or name or ("" if isinstance(value, str) else str(number))
        place = self._given.where(file, f"row {number}")
        entry = self._entries.setdefault((identity, label, split), Entry(place, path, [], split))
        entry.captions.extend(captions)

    def _path(self, file: str, data: bytes, name: str, at: tuple[Finder, int, int]) -> str:
        finder, group, place = at
        offset = finder.find(data)
        if offset is not None:
            return slice_path(file, offset, len(data), name)
        if file.lower().endswith(".arrow"):
            raise DataError(
                f"{self._given.base / file}: compressed Arrow; save it without compression, or as "
                "Parquet"
            )
        return row_path(file, group, place, name)


def _columns(schema: Any, path: Path) -> list[str]:
    """The names of the columns of images and, behind it, of captions."""
    holding = [field.name for field in schema if _holds_bytes(field.type)]
    image = [name for name in (*FILE, *holding) if name in schema.names][:1]
    captions = [name for name in CAPTION if name in schema.names][:1]
    captions = captions or [n for n in schema.names if re.fullmatch(r"captions?_?\d+", n)]
    if not image or not captions:
        lacking = "caption" if image else "image"
        raise DataError(
            f"{path}: no column {lacking} among its columns ({', '.join(schema.names)}); rename it"
        )
    if holding and image[0] not in holding:
        image = holding[:1]
    return image + captions


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _wanted(schema: Any, names: list[str]) -> list[str]:
    also = ("split", "image_id", *FILE)
    return [*names, *(name for name in also if name in schema.names and name not in names)]


def _name(row: dict[str, Any], column: str) -> str:
    """What the dataset calls a row's image: the path beside its bytes, or a column's text."""
    cell = row[column]
    named = cell.get("path") if isinstance(cell, dict) else cell
    others = {key: value for key, value in row.items() if key != column}
    name = named if isinstance(named, str) else first(others, FILE)
    return name if isinstance(name, str) else ""
