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
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crosstill import extras
from crosstill.data import collection
from crosstill.data.fileset import FileSet
from crosstill.data.listings import CAPTION, FILE, captions_of, first, label_of, split_of
from crosstill.data.pairs import SPLIT_NAMES
from crosstill.errors import DataError, ImageError

HUB = "hf:"  # opens the name of a dataset of the hub
LARGE = 2**26  # bytes of a compressed row group from which reading at random is slow
ROWS = 16  # images in memory at a time
BUFFER = 2**20  # bytes read at a time
_GAP = 2**21  # bytes that may lie between two images of a column: a page's header, other columns


def read(
    fileset: FileSet, images: Path | None, splits: Mapping[str, str] | None = None
) -> collection.Listing:
    """List the rows of Parquet or Arrow files, in one pass over their bytes.

    Args:
        fileset: the files.
        images: the folder of images that rows name by path and do not hold.
        splits: of files, where their names do not say.

    Raises:
        DataError: no such file, a missing column, or a value that does not fit.
    """
    rows = _PackedRows(fileset, images, splits or {})
    for file in fileset.names:
        try:
            rows.add_file(file)
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{fileset.base / file}: cannot be read ({reason:.150}); write or download it again"
            ) from None
    return rows.listing()


def read_hub(source: str, images: Path | None) -> collection.Listing:
    """List the dataset "hf:OWNER/NAME" or "hf:OWNER/NAME:CONFIG" of the Hugging Face hub.

    Its own library (the extra `hub`) downloads a dataset once and keeps it as Arrow files in its
    cache; those are read like any others, by content and without the library.

    Raises:
        DataError: no library, no such dataset, no connection, or columns that do not fit.
    """
    name, _, config = source.removeprefix(HUB).partition(":")
    loaded = _load_dataset(name, config or None)
    files = {
        item["filename"]: SPLIT_NAMES.get(str(split).lower())
        for split, part in loaded.items()
        for item in part.cache_files
    }
    if not files:
        raise DataError(f"{source}: it has no rows on disk; open its files instead")
    base = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    splits = {os.path.relpath(file, base): split for file, split in files.items()}
    known = {file: split for file, split in splits.items() if split}
    listing = read(FileSet(base, tuple(splits)), images, known)
    licence = next(iter(loaded.values())).info.license or None
    return listing._replace(name=name, licence=licence)


def _load_dataset(name: str, config: str | None) -> dict[str, Any]:
    datasets = extras.load(f"{HUB}{name}", "hub", "datasets")
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the library's, the hub's and the network's have no common root
        reason = " ".join(str(error).split())
        raise DataError(
            f"{HUB}{name}: cannot be loaded ({type(error).__name__}: {reason:.200}); check the "
            "name and the connection"
        ) from None
    return dict(loaded)


class _PackedRows:
    """Collects the rows of the files: those of one image and split become one entry."""

    def __init__(self, fileset: FileSet, images: Path | None, splits: Mapping[str, str]) -> None:
        self._fileset, self._images, self._splits = fileset, images, splits
        self._source = collection.Packed(fileset.base)
        # (id of the image, what the dataset calls it, split) -> entry
        self._entries: dict[tuple[str, str, str | None], collection.Entry] = {}
        self._bad: list[ImageError] = []
        self._slow = 0
        self._notes: Counter[str] = Counter()

    def listing(self) -> collection.Listing:
        fileset, megabytes = self._fileset, self._slow >> 20
        source, entries = self._sourced()
        notes = [f"{text}: {count}" for text, count in self._notes.items()]
        if self._slow >= LARGE:
            notes.append(
                f"compressed row groups of up to {megabytes} MB, slow to read at random; "
                "write the image column without compression"
            )
        bad = tuple(self._bad)
        return collection.Listing(fileset.name, fileset.origin, source, entries, tuple(notes), bad)

    def _sourced(self) -> tuple[collection.Source, list[collection.Entry]]:
        """Return the source of the images: these files, or, where they hold none, a folder."""
        root, entries = self._images or self._fileset.base, list(self._entries.values())
        if not self._source.images:
            return collection.Folder(root), entries
        alone = (entry.path not in self._source.images for entry in entries)
        return self._source, [
            entry._replace(path=str(root / entry.path)) if by_name else entry
            for entry, by_name in zip(entries, alone, strict=True)
        ]

    def add_file(self, file: str) -> None:
        path, number = self._fileset.base / file, 0
        table = ArrowFile(path) if path.suffix.lower() == ".arrow" else ParquetFile(path)
        names = _columns(table.schema, path)
        if self._source.column not in ("", names[0]):
            raise DataError(
                f"{path}: its images are in column {names[0]}, those before in "
                f"{self._source.column}; name them alike"
            )
        self._source = collection.Packed(self._fileset.base, names[0], self._source.images)
        with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as view:
            also = ("split", "image_id", *FILE)
            more = [n for n in also if n in table.schema.names and n not in names]
            for group, cells in table.groups([*names, *more]):
                finder = Finder(view, *table.span(group, names[0]))
                for place, row in enumerate(cells):
                    self._add(file, number, row, names, (finder, group, place))
                    number += 1
        self._slow = max(self._slow, table.slow)

    def _add(
        self,
        file: str,
        number: int,
        row: dict[str, Any],
        names: list[str],
        at: tuple[Finder, int, int],
    ) -> None:
        where = f"{self._fileset.base / file}, row {number}"
        cell, name = row[names[0]], _name(row, names[0])
        data = collection.image_bytes(cell)
        if data is None and not name:
            self._bad.append(ImageError(f"{file}, row {number}", "no image in its column"))
            return
        value = first(row, CAPTION)
        if value is None:
            value = [row[name] for name in names[1:] if row.get(name) and name not in CAPTION]
        captions = captions_of(value, where, self._notes)
        split = split_of(row, where) or self._splits.get(file) or self._fileset.split(file)
        if data is None:
            path = identity = name if self._images else str(Path(file).parent / name)
        else:
            path = self._path(file, data, name.lstrip("/") or str(number), at)
            identity = self._source.note(path, data)
        # rows of one caption each may repeat an image that has no name
        label = label_of(row) or name or ("" if isinstance(value, str) else str(number))
        place = self._fileset.where(file, f"row {number}")
        entry = self._entries.setdefault(
            (identity, label, split), collection.Entry(place, path, [], split)
        )
        entry.captions.extend(captions)

    def _path(self, file: str, data: bytes, name: str, at: tuple[Finder, int, int]) -> str:
        finder, group, place = at
        offset = finder.find(data)
        if offset is not None:
            return collection.slice_path(file, offset, len(data), name)
        if file.lower().endswith(".arrow"):
            raise DataError(
                f"{self._fileset.base / file}: compressed Arrow; save it without compression, or "
                "as Parquet"
            )
        return collection.row_path(file, group, place, name)


def _columns(schema: Any, path: Path) -> list[str]:
    """Return the name of the column of images and, behind it, those of captions."""
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


def _name(row: dict[str, Any], column: str) -> str:
    """Return the name of a row's image: the path beside its bytes, or a column's text."""
    cell = row[column]
    named = cell.get("path") if isinstance(cell, dict) else cell
    others = {key: value for key, value in row.items() if key != column}
    name = named if isinstance(named, str) else first(others, FILE)
    return name if isinstance(name, str) else ""


class Finder:
    """Finds the bytes of a column's images in a file, in the order of the rows."""

    def __init__(self, view: mmap.mmap, start: int, end: int) -> None:
        self._view, self._start, self._end, self._at = view, start, end, start

    def find(self, data: bytes) -> int | None:
        """Return the offset of an image, or None in a compressed column, where it is nowhere."""
        if not data:
            return 0
        near = min(self._end, self._at + len(data) + _GAP)
        offset = self._view.find(data, self._at, near)
        if offset < 0:  # the same image again, kept once in a dictionary
            return None if (old := self._view.find(data, self._start, self._at)) < 0 else old
        self._at = offset + len(data)
        return offset


class ParquetFile:
    """One Parquet file, row group by row group."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, buffer_size=BUFFER)  # else a whole column at once
        self.schema, self.slow = self._file.schema_arrow, 0

    def groups(self, wanted: list[str]) -> Iterator[tuple[int, Iterator[dict[str, Any]]]]:
        """Yield the number of each row group and its rows."""
        for group in range(self._file.num_row_groups):
            batches = self._file.iter_batches(ROWS, [group], wanted, use_threads=False)
            yield group, (row for batch in batches for row in batch.to_pylist())

    def span(self, group: int, column: str) -> tuple[int, int]:
        """Return start and end of an uncompressed column of images; (0, 0) of a compressed one."""
        meta = self._file.metadata.row_group(group)
        for number in range(meta.num_columns):
            chunk = meta.column(number)
            if chunk.path_in_schema not in (column, f"{column}.bytes"):
                continue
            if chunk.compression != "UNCOMPRESSED":
                self.slow = max(self.slow, chunk.total_uncompressed_size)
                break
            starts = chunk.dictionary_page_offset, chunk.data_page_offset
            start = min(offset for offset in starts if offset)
            return start, start + chunk.total_compressed_size
        return 0, 0


class ArrowFile:
    """One Arrow file as Hugging Face's datasets write it, a stream of record batches."""

    slow = 0

    def __init__(self, path: Path) -> None:
        self._map = pa.memory_map(str(path))
        try:
            self._batches = pa.ipc.open_stream(self._map)
        except pa.ArrowInvalid:
            self._map.seek(0)
            file = pa.ipc.open_file(self._map)
            self._batches = (file.get_batch(i) for i in range(file.num_record_batches))
            self.schema = file.schema
        else:
            self.schema = self._batches.schema

    def groups(self, wanted: list[str]) -> Iterator[tuple[int, Iterator[dict[str, Any]]]]:
        """Yield one group of all rows."""
        yield (
            0,
            (
                row
                for batch in self._batches
                for start in range(0, len(batch), ROWS)
                for row in batch.select(wanted).slice(start, ROWS).to_pylist()
            ),
        )

    def span(self, group: int, column: str) -> tuple[int, int]:
        """Return start and end of the file."""
        return 0, self._map.size()
