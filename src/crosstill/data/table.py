"""CSV and TSV: columns `filepath` and `caption`, and if you like `split` and `image_id`.

One row a caption: rows with the same `filepath` are captions of one image. Where there is an
`image_id` column (your own name for the image) its rows belong together, and the path may be
left empty after the first; crosstill's own ids come from the files' content all the same. Other
names of the two columns are taken too (`rows.FILE`, `rows.CAPTION`), such as `file_name` and
`text` of an image folder's metadata.csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from crosstill.data.base import read_text
from crosstill.data.given import Given, Listing
from crosstill.data.rows import CAPTION, FILE, Rows
from crosstill.errors import DataError


def read(given: Given, images: Path | None) -> Listing:
    """Read tables (tabs between the columns of a .tsv) of images under `images`.

    Raises:
        DataError: a missing column, or a row that does not fit; the message names the row.
    """
    rows = Rows(given, images)
    for file in given.files:
        for number, row in _rows(given.base / file):
            rows.add(file, f"row {number}", row)
    return rows.listing()


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the header with the number of the line on which each ends."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [column.strip() for column in next(lines, [])]
        if lacking := [names[0] for names in (FILE, CAPTION) if not {*names} & {*header}]:
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
