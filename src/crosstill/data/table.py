"""CSV and TSV: columns `filepath` and `caption`, and if you like `split` and `image_id`.

One row a caption: rows with the same `filepath` are captions of one image. Where there is an
`image_id` column (your own name for the image) its rows belong together, and the path may be
left empty after the first; crosstill's own ids come from the files' content all the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from crosstill.data.base import Pairs, read_text, split_name
from crosstill.data.gather import Entry, Folder, gather
from crosstill.errors import DataError

_NEEDED = ("filepath", "caption")


def read(path: Path, root: Path, strict: bool) -> Pairs:
    """Read a table (tabs between the columns of a .tsv) whose images lie under `root`.

    Raises:
        DataError: a missing column, or a row that does not fit; the message names the row.
        ImageError: with `strict`, the first image that cannot be used.
    """
    # Rows of one image and split become one entry: (name of the image, split) -> entry
    entries: dict[tuple[str, str | None], Entry] = {}
    paths: dict[str, str] = {}
    for number, row in _rows(path):
        where = f"row {number}"
        name = row.get("image_id") or row["filepath"]
        file = paths.setdefault(name, row["filepath"])
        if row["filepath"] not in ("", file) or not file:
            raise DataError(
                f"{path}, {where}: filepath {row['filepath']!r} where image {name!r} has "
                f"{file!r}; give each image one file"
            )
        split = split_name(row["split"], f"{path}, {where}") if row.get("split") else None
        entry = entries.setdefault((name, split), Entry(where, file, [], split))
        entry.captions.append(row["caption"])
    return gather(path.stem, path, Folder(root), list(entries.values()), strict)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the header with the number of the line on which each ends."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(lines, [])]
        if lacking := [column for column in _NEEDED if column not in header]:
            raise DataError(
                f"{path}: no column {', '.join(lacking)} in its header ({', '.join(header)}); "
                f"name them in the first row"
            )
        for fields in lines:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, row {lines.line_num}: {len(fields)} fields under {len(header)} "
                    f"columns; put captions in double quotes"
                )
            yield lines.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}, row {lines.line_num}: {error}; double every quote inside a quoted caption"
        ) from None
