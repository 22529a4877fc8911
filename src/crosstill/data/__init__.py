"""Datasets: whatever the form, `open` makes `Pairs` of it, and identity is by content.

    flickr8k.json        Karpathy's JSON (Flickr8k, Flickr30k, COCO)
    pairs.csv, .tsv      columns filepath, caption, and if you like split, image_id
    photos/              images, each with a .txt beside it: a caption a line
    scenes[:COUNT[:SEED]]  rendered here, nothing to download

Images without a split are put into train, val and test, 80/10/10, by their content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from crosstill.data import folder, karpathy, scenes, table
from crosstill.data.base import SPLITS, Pairs, read_image, read_licence
from crosstill.errors import DataError
from crosstill.types import Example

__all__ = ["SPLITS", "Pairs", "open", "reader"]


def open(
    source: str | Path,
    images: str | Path | None = None,
    strict: bool = False,
    licence: str | None = None,
) -> Pairs:
    """Open a dataset in any of the forms above.

    Args:
        source: a file, a folder, or "scenes", "scenes:COUNT", "scenes:COUNT:SEED" (a folder of
            that name is "./scenes").
        images: the folder of the image files that a JSON or a table lists; that of `source`
            when not given.
        strict: raise at the first image that cannot be used instead of setting it apart.
        licence: of photos and captions; else the `license` in the front matter of a README.md
            beside them, if there is one.

    Raises:
        DataError: it is no dataset, or a wrong one; the message names the file and the row.
        ImageError: with `strict`, the first image that cannot be used.
    """
    if str(source).split(":")[0] == "scenes":
        return replace(scenes.read(str(source)), licence=licence)
    path = Path(source)
    found = _read(path, images, strict)
    beside = path if path.is_dir() else path.parent
    return replace(found, licence=licence or read_licence(beside))


def _read(path: Path, images: str | Path | None, strict: bool) -> Pairs:
    root = (Path(images) if images is not None else path.parent).absolute()
    if path.is_dir():
        return folder.read(path.absolute(), strict)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a dataset")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of images; check --images")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return karpathy.read(path, root, strict)
    if suffix in (".csv", ".tsv"):
        return table.read(path, root, strict)
    raise DataError(f"{path}: not a dataset; give a .json, .csv or .tsv file, a folder, or scenes")


def reader(record: dict[str, Any]) -> Callable[[Example], bytes]:
    """The function `Pairs.read` again, from the JSON-able record `Pairs.source`; it pickles.

    Raises:
        DataError: the record is of no form known here.
    """
    if record.get("form") == "files":
        return partial(read_image, Path(record["root"]))
    if record.get("form") == "scenes":
        return partial(scenes.read_scene, record["seed"])
    raise DataError(f"images of form {record.get('form')!r} cannot be read; upgrade crosstill")
