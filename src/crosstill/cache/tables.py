"""Reading of the Parquet tables of a cache, which a stranger may have made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crosstill import artefacts, files

FEW_ROWS = 100_000  # that a table may hold whatever the size of its file
SWELLING = 50  # bytes of text in memory for each byte of a table's file
LEAST = 1 << 26  # bytes of text that a table may always hold


def read(
    path: Path, schema: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> pa.Table:
    """Read a Parquet table that is no larger than its file lets expect.

    A run of equal values takes a few bytes of a file and any number of rows: a table has at most
    a row for each byte of the file, `FEW_ROWS` aside, and swells at most `SWELLING` times.

    Args:
        path: the file.
        schema: Arrow's type of each column that is read, as text.
        optional: the same of columns that may be absent.

    Raises:
        CorruptError: it is a link, damaged, lacks a column, or would be too large.
    """
    artefacts.member(path.parent, path.name)
    with artefacts.readable(path, pa.ArrowException):
        size = path.stat().st_size
        with pq.ParquetFile(path) as file:
            about = file.schema_arrow
            there = {k: v for k, v in (optional or {}).items() if k in about.names}
            schema = {**schema, **there}
            for name, kind in schema.items():
                if name not in about.names or str(about.field(name).type) != kind:
                    raise ValueError(f"no column {name} of {kind}")
            rows = file.metadata.num_rows
            if rows > max(FEW_ROWS, size):
                raise ValueError(f"{rows} rows in {files.amount(size)}")
        texts = [name for name, kind in schema.items() if kind in ("string", "binary")]
        packed = pq.read_table(path, columns=list(schema), read_dictionary=texts, memory_map=False)
        packed.validate(full=True)  # that texts are UTF-8
        _check_swelling(packed, size)
        return packed.cast(pa.schema([about.field(name) for name in schema]))


def _check_swelling(packed: pa.Table, size: int) -> None:
    """Refuse a table whose texts, written out, would take far more than its file."""
    total = 0
    for column in packed.itercolumns():
        if column.null_count:
            raise ValueError("an empty cell")
        for chunk in column.chunks:
            if hasattr(chunk, "dictionary") and len(chunk):
                lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
                total += pc.sum(lengths.cast("int64")).as_py() or 0
    if total > max(LEAST, SWELLING * size):
        raise ValueError(f"{files.amount(total)} of text in {files.amount(size)}")
