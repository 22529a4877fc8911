"""Karpathy's JSON, in which Flickr8k, Flickr30k and COCO are handed around.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
CVPR 2015. Read are `images[].filename`, `filepath` (COCO's subfolder), `split` and
`sentences[].raw`; COCO's split "restval" counts as train.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crosstill.data.base import Pairs, read_text, split_name
from crosstill.data.gather import Entry, Folder, gather
from crosstill.errors import DataError


def read(path: Path, root: Path, strict: bool) -> Pairs:
    """Read a Karpathy JSON file whose images lie under `root`.

    Raises:
        DataError: bad JSON, or another layout; the message names the entry.
        ImageError: with `strict`, the first image that cannot be used.
    """
    value = _parse(path)
    items = value.get("images") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list named 'images'; give a file in Karpathy's layout")
    entries = [_entry(item, f"images[{i}]", path) for i, item in enumerate(items)]
    name = value.get("dataset")
    return gather(name if isinstance(name, str) else path.stem, path, Folder(root), entries, strict)


def _parse(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: bad JSON ({error.msg}); mend or download it again"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: bad JSON (nested too deep); download it again") from None


def _entry(item: Any, where: str, path: Path) -> Entry:
    file = _text(item, "filename", where, path)
    folder = _text(item, "filepath", where, path) if "filepath" in item else ""
    split = _text(item, "split", where, path) if "split" in item else ""
    sentences = item.get("sentences", [])
    if not isinstance(sentences, list):
        raise DataError(f"{path}, {where}: 'sentences' is no list; see Karpathy's layout")
    captions = [
        _text(sentence, "raw", f"{where}.sentences[{k}]", path)
        for k, sentence in enumerate(sentences)
    ]
    return Entry(
        where,
        f"{folder}/{file}" if folder else file,
        captions,
        split_name(split, f"{path}, {where}") if split else None,
    )


def _text(item: Any, key: str, where: str, path: Path) -> str:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{path}, {where}: no text under {key!r}; see Karpathy's layout")
    return value
