"""COCO's own ids of images and captions: extended ground truth speaks them, nothing else here.

An image's id is the number that its file is named by, as in COCO_val2014_000000391895.jpg. A
caption's id stands beside its text in COCO's `captions_val2014.json` (`annotations[].id`) and in
Karpathy's `dataset_coco.json` (`sentences[].sentid`, the same numbers).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from crosstill.data.karpathy import parse
from crosstill.errors import DataError
from crosstill.types import Example

Captions = Mapping[int, Sequence[tuple[str, int]]]  # image id → its captions, text and id


class Rows(NamedTuple):
    """Where the images and captions of a split are: COCO's id → row."""

    images: dict[int, int]
    captions: dict[int, int]


def read_captions(path: Path) -> Captions:
    """The captions of a COCO or a Karpathy JSON.

    Raises:
        DataError: it cannot be read, or has neither layout.
    """
    value = parse(path)
    try:
        return _collect(_coco(value) if "annotations" in value else _karpathy(value))
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: no ids of COCO's captions in it; give captions_val2014.json or "
            "dataset_coco.json after --annotations"
        ) from None


def rows(known: Captions, examples: Sequence[Example]) -> Rows:
    """Find the ids of a split's images by file name and of its captions by text.

    Only letters and digits of a text are compared, so that cleaning does not matter.
    """
    found, row = Rows({}, {}), 0
    for position, example in enumerate(examples):
        number = image_id(example.path)
        left = defaultdict(list)
        for text, caption in known.get(number, ()) if number is not None else ():
            left[_plain(text)].append(caption)
        if number is not None:
            found.images[number] = position
        for text in example.captions:
            same = left[_plain(text)]
            if same:
                found.captions[same.pop(0)] = row
            row += 1
    return found


def image_id(name: str) -> int | None:
    """The number of twelve digits at the end of a COCO file's name; None of any other file."""
    digits = re.search(r"(?<!\d)\d{12}$", PurePath(name).stem)
    return int(digits[0]) if digits else None


def _coco(value: Mapping[str, Any]) -> Iterable[tuple[int, str, int]]:
    return [(a["image_id"], a["caption"], a["id"]) for a in value["annotations"]]


def _karpathy(value: Mapping[str, Any]) -> Iterable[tuple[int, str, int]]:
    return [
        (image["cocoid"], sentence["raw"], sentence["sentid"])
        for image in value["images"]
        for sentence in image["sentences"]
    ]


def _collect(captions: Iterable[tuple[int, str, int]]) -> Captions:
    found: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    for image, text, number in captions:
        found[int(image)].append((text.strip(), int(number)))
    return found


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))
