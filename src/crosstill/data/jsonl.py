"""JSONL: an image or a caption a line, by keys as a table's columns, or in BEiT-3's layout.

BEiT-3's index files (microsoft/unilm, beit3/datasets.py; coco_retrieval.train.jsonl,
flickr30k.val.jsonl) hold `image_path`, `image_id`, which counts anew in every split, and
`text_segment`: the tokens of a caption as ids of beit3.spm, as pieces, or plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from crosstill.data.base import regular, unreadable
from crosstill.data.given import Given, Listing
from crosstill.data.rows import CAPTION, FILE, Rows
from crosstill.errors import DataError

SPM = "beit3.spm"
_UNKNOWN, _SHIFT = 3, 1  # fairseq's numbering: four specials, then the pieces from SPM's third on


def read(given: Given, images: Path | None) -> Listing:
    """Read JSONL files of images under `images`.

    Raises:
        DataError: a line that is no JSON, or a value that does not fit; the message names it.
    """
    rows, rebuilt, lost = Rows(given, images), 0, 0
    for file in given.files:
        for number, row in _lines(given.base / file):
            where = f"{given.base / file}, line {number}"
            if "text_segment" in row:
                text, tokens, unknown = _caption(row["text_segment"], where, given, images)
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
    told = tuple(f"{text}: {count}" for text, count in notes.items() if count)
    listing = rows.listing()
    return listing._replace(notes=listing.notes + told)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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
        told = getattr(error, "msg", "nested too deep")
        raise DataError(f"{where}: bad JSON ({told}); one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: no JSON object; one object a line, such as {{"filepath": …}}')
    return row


def _lacking(row: dict[str, Any]) -> str:
    if not {*FILE, "image_id"} & {*row}:
        return FILE[0]
    return "" if {*CAPTION} & {*row} else CAPTION[0]


def _caption(
    segment: Any, where: str, given: Given, images: Path | None
) -> tuple[str | None, bool, bool]:
    """The text of a `text_segment`, whether it was made of tokens, and whether one is unknown."""
    if segment is None or isinstance(segment, str):
        return segment, False, False
    pieces = segment if isinstance(segment, list) else [segment]
    if pieces and all(type(token) is int for token in pieces):
        vocabulary = _vocabulary(where, (given.base, *([images] if images else [])))
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
