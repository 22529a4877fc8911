"""Listings of images and captions: a row each in CSV, TSV and JSONL, or Karpathy's and COCO's JSON.

Columns or keys are `filepath` and `caption`, and if you like `split` and `image_id`; other names
of the first two are taken too (`FILE`, `CAPTION`), such as `file_name` and `text` of an image
folder's metadata.csv. Rows with the same `filepath` are captions of one image. Where there is an
`image_id` (your own name for the image) its rows belong together, and the path may be left empty
after the first; crosstill's own ids come from the files' content all the same.

BEiT-3's index files (microsoft/unilm, beit3/datasets.py; coco_retrieval.train.jsonl,
flickr30k.val.jsonl) hold `image_path`, `image_id`, which counts anew in every split, and
`text_segment`: the tokens of a caption as ids of beit3.spm, as pieces, or plain text.

In Karpathy's JSON (Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image
Descriptions", CVPR 2015) Flickr8k, Flickr30k and COCO are handed around. Read are
`images[].filename`, `filepath` (COCO's subfolder), `split` and `sentences[].raw`; COCO's split
"restval" counts as train. Such a file may also give the splits of another listing (`apply_splits`).

Of COCO's (Chen et al., "Microsoft COCO Captions", arXiv 1504.00325: captions_train2014.json and its
like) are read `images[].id`, `file_name` and `annotations[].image_id`, `caption`; the file's name
says the split and the folder of its images.
"""

import ast
import csv
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from crosstill import extras, formats
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
    library = extras.load(f"{path}: reading it", "beit3", "sentencepiece")
    try:
        model = library.SentencePieceProcessor(model_file=str(path))
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


def read_json(fileset: FileSet, images: Path | None) -> Listing:
    """Read JSON files whose images lie under `images`, or else beside them.

    Raises:
        DataError: bad JSON, or another layout; the message names the entry.
    """
    entries, names = [], []
    root = images or fileset.base
    if images is None and root.name == "annotations":
        root = root.parent  # as COCO's archives unpack
    for file in fileset.names:
        path = fileset.base / file
        content = parse_json(path)
        items = content.get("images") if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise DataError(
                f"{path}: no list named 'images'; give a file in Karpathy's or COCO's layout"
            )
        if "annotations" in content:
            entries += list(_coco(content, fileset, file, root))
            continue
        names.append(content.get("dataset"))
        for number, item in enumerate(items):
            entries.append(_karpathy(item, f"images[{number}]", fileset, file))
    name = names[0] if len(fileset.names) == 1 and names else None
    name = name if isinstance(name, str) else fileset.name
    return Listing(name, fileset.origin, Folder(root), entries)


def parse_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: it is not JSON; the message names the line.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: bad JSON ({error.msg}); mend or download it again"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: bad JSON (nested too deep); download it again") from None


def _karpathy(item: Any, place: str, fileset: FileSet, file: str) -> Entry:
    where = f"{fileset.base / file}, {place}"
    name = _required_text(item, "filename", where)
    folder = _required_text(item, "filepath", where) if "filepath" in item else ""
    split = _required_text(item, "split", where) if "split" in item else ""
    sentences = item.get("sentences", [])
    if not isinstance(sentences, list):
        raise DataError(f"{where}: 'sentences' is no list; see Karpathy's layout")
    captions = [
        _required_text(sentence, "raw", f"{where}.sentences[{k}]")
        for k, sentence in enumerate(sentences)
    ]
    return Entry(
        fileset.where(file, place),
        f"{folder}/{name}" if folder else name,
        captions,
        split_name(split, where) if split else None,
    )


def _coco(content: dict[str, Any], fileset: FileSet, file: str, root: Path) -> Iterator[Entry]:
    path, split = fileset.base / file, fileset.split(file)
    folder = Path(file).stem.rpartition("_")[2]  # captions_train2014.json: train2014
    folder = f"{folder}/" if (root / folder).is_dir() else ""
    captions: dict[Any, list[str]] = {}
    for number, item in enumerate(content["images"]):
        captions[_required_number(item, "id", f"{path}, images[{number}]")] = []
    annotations = content["annotations"]
    if not isinstance(annotations, list):
        raise DataError(f"{path}: 'annotations' is no list; see COCO's layout")
    for number, item in enumerate(annotations):
        where = f"{path}, annotations[{number}]"
        image = _required_number(item, "image_id", where)
        if image not in captions:
            raise DataError(f"{where}: image_id {image} is not among 'images'; download it again")
        captions[image].append(_required_text(item, "caption", where))
    for number, item in enumerate(content["images"]):
        place = f"images[{number}]"
        name = folder + _required_text(item, "file_name", f"{path}, {place}")
        yield Entry(fileset.where(file, place), name, captions[item["id"]], split)


def _required_number(item: Any, key: str, where: str) -> int:
    number = item.get(key) if isinstance(item, dict) else None
    if type(number) is not int:
        raise DataError(f"{where}: no number under {key!r}; see COCO's layout")
    return number


def _required_text(item: Any, key: str, where: str) -> str:
    text = item.get(key) if isinstance(item, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: no text under {key!r}; see Karpathy's or COCO's layout")
    return text


def apply_splits(listing: Listing, path: Path) -> Listing:
    """Give every image the split that the file at `path` says, and leave out the others.

    Images are matched by file name and, where the file has COCO's ids, by the number at the end
    of the name: COCO_val2014_000000000042.jpg and 000000000042.jpg are one.

    Raises:
        DataError: no file in Karpathy's layout, or it names none of the images.
    """
    splits, count = _splits(path)
    entries, matched = [], set()
    for entry in listing.entries:
        name = formats.name_key(PurePath(entry.path).name)
        digits = re.search(r"(\d{12})\.\w+$", name)
        keys: tuple[str | int, ...] = (name, int(digits[1])) if digits else (name,)
        key = next((key for key in keys if key in splits), None)
        if key is not None:
            number, split = splits[key]
            matched.add(number)
            entries.append(entry._replace(split=split))
    if not entries:
        raise DataError(
            f"{path}: it names none of the {len(listing.entries)} images of {listing.origin}, "
            f"such as {listing.entries[0].path if listing.entries else ''}; give its own --splits"
        )
    counts = {
        f"images that {path.name} does not name, left out": len(listing.entries) - len(entries),
        f"images of {path.name} that are not in the dataset": count - len(matched),
    }
    notes = tuple(f"{text}: {count}" for text, count in counts.items() if count)
    return listing._replace(entries=entries, notes=listing.notes + notes)


def _splits(path: Path) -> tuple[dict[str | int, tuple[int, str]], int]:
    """Read (number of the image, split) by file name and by COCO's id; and count the images."""
    content = parse_json(path)
    items = content.get("images") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list named 'images'; --splits is a file in Karpathy's layout")
    splits: dict[str | int, tuple[int, str]] = {}
    for number, item in enumerate(items):
        where = f"{path}, images[{number}]"
        row: dict[str, Any] = item if isinstance(item, dict) else {}
        name, split = row.get("filename"), row.get("split")
        if not isinstance(name, str) or not isinstance(split, str):
            raise DataError(f"{where}: no text under 'filename' or 'split'; see Karpathy's layout")
        numbered = number, split_name(split, where)
        splits[formats.name_key(name)] = numbered
        if type(row.get("cocoid")) is int:
            splits[row["cocoid"]] = numbered
    return splits, len({number for number, _ in splits.values()})
