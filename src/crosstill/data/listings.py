"""Listings of a row an image or a caption: CSV, TSV and JSONL, BEiT-3's index files among them.

Columns or keys are `filepath` and `caption`, and if you like `split` and `image_id`; other names
of the first two are taken too (`FILE`, `CAPTION`), such as `file_name` and `text` of an image
folder's metadata.csv. Rows with the same `filepath` are captions of one image. Where there is an
`image_id` (your own name for the image) its rows belong together, and the path may be left empty
after the first; crosstill's own ids come from the files' content all the same.

BEiT-3's index files (microsoft/unilm, beit3/datasets.py; coco_retrieval.train.jsonl,
flickr30k.val.jsonl) hold `image_path`, `image_id`, which counts anew in every split, and
`text_segment`: the tokens of a caption as ids of beit3.spm, as pieces, or plain text.
"""

import ast
import csv
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from crosstill import formats
from crosstill.data.collection import Entry, Folder, Listing
from crosstill.data.fileset import FileSet
from crosstill.data.pairs import read_text, regular, split_name, unreadable
from crosstill.errors import DataError

FILE = ("filepath", "file", "image", "file_name", "filename", "image_path")
CAPTION = ("caption", "captions", "text")
SPM = "beit3.spm"
_UNKNOWN, _SHIFT = 3, 1  # fairseq's numbering: four specials, then the pieces from SPM's third on

# notes on what may be meant, or not
WRITTEN = "lists of captions written as one text, each read as its captions"
BROKEN = "rows of a table that run over several lines between quotes"


def read_table(fileset: FileSet, images: Path | None) -> Listing:
    """Read tables (tabs between the columns of a .tsv) of images under `images`.

    Raises:
        DataError: a missing column, or a row that does not fit; the message names the row.
    """
    rows, broken = FileRows(fileset, images), []
    for file in fileset.names:
        for start, end, row in _table_rows(fileset.base / file):
            rows.add(file, f"row {start}", row)
            if start != end:
                broken.append(f"lines {start} to {end} of {file}")
    listing = rows.listing()
    if not broken:
        return listing
    note = f"{BROKEN}, first {broken[0]}: {len(broken)}"
    return listing._replace(notes=(*listing.notes, note))


def _table_rows(path: Path) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield the first and last line of every row below the header, and its values by column."""
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


def read_jsonl(fileset: FileSet, images: Path | None) -> Listing:
    """Read JSONL files of images under `images`.

    Raises:
        DataError: a line that is no JSON, or a value that does not fit; the message names it.
    """
    rows, rebuilt, lost = FileRows(fileset, images), 0, 0
    for file in fileset.names:
        for number, row in _json_rows(fileset.base / file):
            where = f"{fileset.base / file}, line {number}"
            if "text_segment" in row:
                text, tokens, unknown = _caption(row["text_segment"], where, fileset, images)
                row = {"image_path": row.get("image_path"), "caption": text}
                rebuilt, lost = rebuilt + tokens, lost + unknown
            elif missing := _lacking(row):
                keys = ", ".join(row)
                raise DataError(f"{where}: no {missing} among its keys ({keys}); name it so")
            rows.add(file, f"line {number}", row)
    notes = {
        "captions rebuilt from tokens, which keep no double spaces": rebuilt,
        "captions with a token that beit3.spm does not know, each now a '?'": lost,
    }
    listing = rows.listing()
    counted = tuple(f"{text}: {count}" for text, count in notes.items() if count)
    return listing._replace(notes=listing.notes + counted)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with regular(path).open("rb") as file:
            for number, line in enumerate((line for raw in file for line in raw.splitlines()), 1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep")
        raise DataError(f"{where}: bad JSON ({reason}); one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: no JSON object; one object a line, such as {{"filepath": …}}')
    return row


def _lacking(row: dict[str, Any]) -> str:
    if not {*FILE, "image_id"} & {*row}:
        return FILE[0]
    return "" if {*CAPTION} & {*row} else CAPTION[0]


def _caption(
    segment: Any, where: str, fileset: FileSet, images: Path | None
) -> tuple[str | None, bool, bool]:
    """Return the text of a `text_segment`; was it made of tokens; is one of them unknown."""
    if segment is None or isinstance(segment, str):
        return segment, False, False
    pieces = segment if isinstance(segment, list) else [segment]
    if pieces and all(type(token) is int for token in pieces):
        vocabulary = _vocabulary(where, (fileset.base, *([images] if images else [])))
        pieces = [_piece(token, vocabulary, where) for token in segment]
    if not all(isinstance(piece, str) for piece in pieces):
        raise DataError(f"{where}: 'text_segment' is no list of tokens; see BEiT-3's layout")
    text = "".join(pieces).replace("\u2581", " ").strip()
    return text, True, _UNKNOWN in segment


def _piece(token: int, vocabulary: list[str], where: str) -> str:
    if token == _UNKNOWN:
        return "?"
    if not _UNKNOWN < token < len(vocabulary) + _SHIFT:
        raise DataError(f"{where}: token {token} is not of this {SPM}; give the one it was made by")
    return vocabulary[token - _SHIFT]


def _vocabulary(where: str, folders: tuple[Path, ...]) -> list[str]:
    for folder in folders:
        if (folder / SPM).is_file():
            return _pieces(folder / SPM)
    raise DataError(f"{where}: captions are token ids; put {SPM} beside the file to read them")


@lru_cache(maxsize=2)
def _pieces(path: Path) -> list[str]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise DataError(
            f'{path}: reading it needs sentencepiece: pip install "crosstill[beit3]"'
        ) from None
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise DataError(f"{path}: not a SentencePiece model; download it again") from None
    return [model.id_to_piece(number) for number in range(model.get_piece_size())]


class FileRows:
    """Collects rows that name image files: rows of one image and split become one entry.

    Args:
        fileset: the files of the tables.
        images: the folder of the image files; each table's own folder where it is None.
    """

    def __init__(self, fileset: FileSet, images: Path | None) -> None:
        self._fileset, self._images = fileset, images
        # (table, name of the image, split) -> entry
        self._entries: dict[tuple[str, str, str | None], Entry] = {}
        self._paths: dict[tuple[str, str], str] = {}
        self._notes: Counter[str] = Counter()

    def add(self, file: str, place: str, row: Mapping[str, Any]) -> None:
        """Take one row, under whichever of the known names its columns go.

        Raises:
            DataError: a value that does not fit; the message names the file and the place.
        """
        where = f"{self._fileset.base / file}, {place}"
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
        split = split_of(row, where) or self._fileset.split(file)
        full = known if self._images else os.path.join(os.path.dirname(file), known)
        entry = Entry(self._fileset.where(file, place), full, [], split)
        entry = self._entries.setdefault((file, name, split), entry)
        entry.captions.extend(captions_of(first(row, CAPTION), where, self._notes))

    def listing(self) -> Listing:
        """Return the rows so far as a listing of files."""
        source = Folder(self._images or self._fileset.base)
        fileset = self._fileset
        notes = tuple(f"{text}: {count}" for text, count in self._notes.items())
        return Listing(fileset.name, fileset.origin, source, list(self._entries.values()), notes)


def first(row: Mapping[str, Any], names: Collection[str]) -> Any:
    """Return the value under the first of the names that has one; else the first name's, or None.

    An empty text or list is no value: `filename` counts where `image` is empty.
    """
    values = [row[name] for name in names if row.get(name) is not None]
    filled = (v for v in values if v != [] and not (isinstance(v, str) and not v.strip()))
    return next(filled, values[0] if values else None)


def text_of(value: Any, where: str, key: str) -> str:
    """Return a text, or "" for none; `where` and `key` are for the error."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} holds {_kind(value)}; it must be text")
    return value or ""


def captions_of(value: Any, where: str, notes: Counter[str]) -> list[str]:
    """Return a list of one caption, several or none; `notes` counts lists written as a text."""
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
    """Parse a list that Python or JSON wrote, as in Flickr30k's column `raw`; else None."""
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
    """Return the user's own name for the image of a row, or ""."""
    value = row.get("image_id")
    return "" if value is None else str(value)


def split_of(row: Mapping[str, Any], where: str) -> str | None:
    """Return the split that a row names, or None."""
    text = text_of(row.get("split"), where, "split")
    return split_name(text, where) if text else None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the {type(value).__name__} {value!r:.40}")
