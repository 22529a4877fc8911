"""JSON listings: Karpathy's, in which Flickr8k, Flickr30k and COCO are handed around, and COCO's.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
CVPR 2015. Read are `images[].filename`, `filepath` (COCO's subfolder), `split` and
`sentences[].raw`; COCO's split "restval" counts as train.

Chen et al., "Microsoft COCO Captions", arXiv 1504.00325: captions_train2014.json and its like.
Read are `images[].id`, `file_name` and `annotations[].image_id`, `caption`; the file's name says
the split and the folder of its images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosstill.data.base import read_text, split_name
from crosstill.data.gather import Entry, Folder
from crosstill.data.given import Given, Listing
from crosstill.errors import DataError


def read(given: Given, images: Path | None) -> Listing:
    """Read JSON files whose images lie under `images`, or else beside them.

    Raises:
        DataError: bad JSON, or another layout; the message names the entry.
    """
    entries, names = [], []
    root = images or given.base
    if images is None and root.name == "annotations":
        root = root.parent  # as COCO's archives unpack
    for file in given.files:
        path = given.base / file
        value = parse(path)
        items = value.get("images") if isinstance(value, dict) else None
        if not isinstance(items, list):
            raise DataError(
                f"{path}: no list named 'images'; give a file in Karpathy's or COCO's layout"
            )
        if "annotations" in value:
            entries += list(_coco(value, given, file, root))
            continue
        names.append(value.get("dataset"))
        for number, item in enumerate(items):
            entries.append(_karpathy(item, f"images[{number}]", given, file))
    name = names[0] if len(given.files) == 1 and names else None
    name = name if isinstance(name, str) else given.name
    return Listing(name, given.origin, Folder(root), entries)


def parse(path: Path) -> Any:
    """The value of a JSON file.

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


def _karpathy(item: Any, place: str, given: Given, file: str) -> Entry:
    where = f"{given.base / file}, {place}"
    name = _text(item, "filename", where)
    folder = _text(item, "filepath", where) if "filepath" in item else ""
    split = _text(item, "split", where) if "split" in item else ""
    sentences = item.get("sentences", [])
    if not isinstance(sentences, list):
        raise DataError(f"{where}: 'sentences' is no list; see Karpathy's layout")
    captions = [
        _text(sentence, "raw", f"{where}.sentences[{k}]") for k, sentence in enumerate(sentences)
    ]
    return Entry(
        given.where(file, place),
        f"{folder}/{name}" if folder else name,
        captions,
        split_name(split, where) if split else None,
    )


def _coco(value: dict[str, Any], given: Given, file: str, root: Path) -> Iterator[Entry]:
    path, split = given.base / file, given.split(file)
    folder = Path(file).stem.rpartition("_")[2]  # captions_train2014.json: train2014
    folder = f"{folder}/" if (root / folder).is_dir() else ""
    captions: dict[Any, list[str]] = {}
    for number, item in enumerate(value["images"]):
        captions[_number(item, "id", f"{path}, images[{number}]")] = []
    annotations = value["annotations"]
    if not isinstance(annotations, list):
        raise DataError(f"{path}: 'annotations' is no list; see COCO's layout")
    for number, item in enumerate(annotations):
        where = f"{path}, annotations[{number}]"
        image = _number(item, "image_id", where)
        if image not in captions:
            raise DataError(f"{where}: image_id {image} is not among 'images'; download it again")
        captions[image].append(_text(item, "caption", where))
    for number, item in enumerate(value["images"]):
        place = f"images[{number}]"
        name = folder + _text(item, "file_name", f"{path}, {place}")
        yield Entry(given.where(file, place), name, captions[item["id"]], split)


def _number(item: Any, key: str, where: str) -> int:
    value = item.get(key) if isinstance(item, dict) else None
    if type(value) is not int:
        raise DataError(f"{where}: no number under {key!r}; see COCO's layout")
    return value


def _text(item: Any, key: str, where: str) -> str:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, str):
        raise DataError(f"{where}: no text under {key!r}; see Karpathy's or COCO's layout")
    return value
