"""Parquet and Arrow files as rows of cells, and where in them the bytes of an image lie."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 16  # images in memory at a time
BUFFER = 2**20  # bytes read at a time
_GAP = 2**21  # bytes that may lie between two images of a column: a page's header, other columns


class Finder:
    """Where in a file the bytes of a column's images lie, asked for in the order of the rows."""

    def __init__(self, view: mmap.mmap, start: int, end: int) -> None:
        self._view, self._start, self._end, self._at = view, start, end, start

    def find(self, data: bytes) -> int | None:
        """The offset of an image, or None in a compressed column, where it is nowhere."""
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
        """Row groups, and the rows of each."""
        for group in range(self._file.num_row_groups):
            batches = self._file.iter_batches(ROWS, [group], wanted, use_threads=False)
            yield group, (row for batch in batches for row in batch.to_pylist())

    def span(self, group: int, column: str) -> tuple[int, int]:
        """The bytes of an uncompressed column of images; nothing of a compressed one."""
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
        """One group of all rows."""
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
        """The whole file."""
        return 0, self._map.size()
