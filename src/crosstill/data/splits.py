"""Karpathy's JSON as the judge of splits: which of another listing's images are in which."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from crosstill import formats
from crosstill.data.base import split_name
from crosstill.data.gather import Entry
from crosstill.data.given import Listing
from crosstill.data.json_files import parse
from crosstill.errors import DataError


def apply(listing: Listing, path: Path) -> Listing:
    """Give every image the split that the file at `path` says, and leave out the others.

    Images are matched by file name and, where the file has COCO's ids, by the number at the end
    of the name: COCO_val2014_000000000042.jpg and 000000000042.jpg are one.

    Raises:
        DataError: no file in Karpathy's layout, or it names none of the images.
    """
    known = _splits(path)
    entries, met = [], set()
    for entry in listing.entries:
        key = next((key for key in _keys(entry) if key in known), None)
        if key is not None:
            met.add(known[key][0])
            entries.append(entry._replace(split=known[key][1]))
    if not entries:
        raise DataError(
            f"{path}: it names none of the {len(listing.entries)} images of {listing.origin}, "
            f"such as {listing.entries[0].path if listing.entries else ''}; give its own --splits"
        )
    counts = {
        f"images that {path.name} does not name, left out": len(listing.entries) - len(entries),
        f"images of {path.name} that are not in the dataset": _images(known) - len(met),
    }
    notes = tuple(f"{text}: {count}" for text, count in counts.items() if count)
    return listing._replace(entries=entries, notes=listing.notes + notes)


def _splits(path: Path) -> dict[str | int, tuple[int, str]]:
    """(number of the image, split) by file name and by COCO's id."""
    value = parse(path)
    items = value.get("images") if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise DataError(f"{path}: no list named 'images'; --splits is a file in Karpathy's layout")
    known: dict[str | int, tuple[int, str]] = {}
    for number, item in enumerate(items):
        where = f"{path}, images[{number}]"
        row: dict[str, Any] = item if isinstance(item, dict) else {}
        name, split = row.get("filename"), row.get("split")
        if not isinstance(name, str) or not isinstance(split, str):
            raise DataError(f"{where}: no text under 'filename' or 'split'; see Karpathy's layout")
        told = number, split_name(split, where)
        known[formats.name_key(name)] = told
        if type(row.get("cocoid")) is int:
            known[row["cocoid"]] = told
    return known


def _keys(entry: Entry) -> tuple[str | int, ...]:
    name = formats.name_key(PurePath(entry.path).name)
    digits = re.search(r"(\d{12})\.\w+$", name)
    return (name, int(digits[1])) if digits else (name,)


def _images(known: dict[str | int, tuple[int, str]]) -> int:
    return len({number for number, _ in known.values()})
