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

from crosstill import formats
from crosstill.data.base import read_text
from crosstill.data.given import Given, Listing
from crosstill.data.rows import CAPTION, FILE, Rows
from crosstill.errors import DataError

# the note on fields with lines in them: what is meant, or rows that an unpaired quote swallowed
BROKEN = "rows of a table that run over several lines between quotes"


def read(given: Given, images: Path | None) -> Listing:
    """Read tables (tabs between the columns of a .tsv) of images under `images`.

    Raises:
        DataError: a missing column, or a row that does not fit; the message names the row.
    """
    rows, broken = Rows(given, images), []
    for file in given.files:
        for start, end, row in _rows(given.base / file):
            rows.add(file, f"row {start}", row)
            if start != end:
                broken.append(f"lines {start} to {end} of {file}")
    listing = rows.listing()
    if not broken:
        return listing
    note = f"{BROKEN}, first {broken[0]}: {len(broken)}"
    return listing._replace(notes=(*listing.notes, note))


def _rows(path: Path) -> Iterator[tuple[int, int, dict[str, str]]]:
    """The rows below the header with the lines on which each begins and ends."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    text = read_text(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = [column.strip() for column in next(lines, [])]
        if lacking := [names[0] for names in (FILE, CAPTION) if not {*names} & {*header}]:
            raise DataError(
                f"{path}: no column {', '.join(lacking)} in its header ({', '.join(header)}); "
                f"name them in the first row"
            )
        while True:
            start = lines.line_num + 1
            if (fields := next(lines, None)) is None:
                return
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, row {start}: {len(fields)} fields under {len(header)} "
                    f"columns; put captions in double quotes"
                )
            if start != lines.line_num:
                _refuse_swallowed(path, text, start, lines.line_num, header, delimiter)
            yield start, lines.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        if lines.line_num == start and "field limit" in str(error):
            raise DataError(f"{path}, row {start}: {error}; shorten it") from None
        raise DataError(
            f"{path}, row {start}: a quote opens there that closes no field up to row "
            f"{lines.line_num} ({error}); double every quote inside a quoted caption, and take "
            "single ones out"
        ) from None


def _refuse_swallowed(
    path: Path, text: str, start: int, end: int, header: list[str], delimiter: str
) -> None:
    """Refuse a field over several lines when one of these is a row itself: it names an image."""
    places = [place for place, column in enumerate(header) if column in FILE]
    known = formats.PHOTOS | formats.UNSUPPORTED.keys()
    for number, line in enumerate(formats.lines(text)[start:end], start + 1):
        fields = line.split(delimiter)
        named = [fields[place] for place in places if place < len(fields)]
        if len(fields) >= len(header) and any(formats.ending(n.strip()) in known for n in named):
            raise DataError(
                f"{path}, row {start}: a quote opens there and closes in row {end}, and row "
                f"{number} between them is one of its own ({named[0]:.60}); double that quote, or "
                "take it out"
            )
