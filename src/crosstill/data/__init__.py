"""Datasets: whatever the form, `open` makes `Pairs` of it, and identity is by content.

    flickr8k.json        Karpathy's JSON (Flickr8k, Flickr30k, COCO)
    captions_val2014.json, annotations/    COCO's captions
    pairs.csv, .tsv      columns filepath, caption, and if you like split, image_id
    pairs.jsonl          the same keys; or BEiT-3's index files
    train-*.parquet      image bytes and captions in columns
    shards/{00..09}.tar  WebDataset: KEY.jpg beside KEY.txt or KEY.json
    photos/              images, each with a .txt beside it: a caption a line; or an image folder
                         with metadata.csv or .jsonl; or any of the files above
    saved/, hf:OWNER/NAME    what Hugging Face's datasets saved, or load from the hub
    scenes[:COUNT[:SEED]]  rendered here, nothing to download

Images without a split are put into train, val and test, 80/10/10, by their content.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from crosstill import plugins
from crosstill.data import listings, scenes
from crosstill.data.collection import Entry, Folder, Listing, collect
from crosstill.data.fileset import FileSet, locate, read_photo_folder
from crosstill.data.pairs import SPLITS, HashedReader, Pairs, read_licence
from crosstill.errors import DataError

__all__ = [
    "FORMATS",
    "SOURCES",
    "SPLITS",
    "Entry",
    "FileSet",
    "Folder",
    "Listing",
    "Pairs",
    "open",
    "reader",
]

# The reader of every kind of file by its ending, a function of (fileset, images)
_FORMATS = {
    ".json": "crosstill.data.listings:read_json",
    ".csv": "crosstill.data.listings:read_table",
    ".tsv": "crosstill.data.listings:read_table",
    ".jsonl": "crosstill.data.listings:read_jsonl",
    ".parquet": "crosstill.data.parquet:read",
    ".arrow": "crosstill.data.parquet:read",
    **dict.fromkeys(
        (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"), "crosstill.data.shards:read"
    ),
}
FORMATS = plugins.Kind(__name__, "data format", _FORMATS)

# The reader of images by the form in their source's record, a function of the record
_SOURCES = {
    "files": "crosstill.data.collection:files_reader",
    "packed": "crosstill.data.collection:packed_reader",
    "scenes": "crosstill.data.scenes:scenes_reader",
}
SOURCES = plugins.Kind(f"{__name__}.sources", "source of images", _SOURCES)


def open(
    source: str | Path,
    images: str | Path | None = None,
    strict: bool = False,
    licence: str | None = None,
    splits: str | Path | None = None,
) -> Pairs:
    """Open a dataset in any of the forms above.

    Args:
        source: a file, several (commas, wildcards, braces), a folder, "hf:OWNER/NAME[:CONFIG]", or
            "scenes", "scenes:COUNT", "scenes:COUNT:SEED" (a folder of that name is "./scenes").
        images: the folder of the image files that a listing names; that of `source` when not
            given.
        strict: raise at the first image that cannot be used instead of setting it apart.
        licence: of photos and captions; else the `license` in the front matter of a README.md
            beside them, if there is one.
        splits: a file in Karpathy's layout that says which image is in which split.

    Raises:
        DataError: it is no dataset, or a wrong one; the message names the file and the row.
        ImageError: with `strict`, the first image that cannot be used.
    """
    if str(source).split(":")[0] == "scenes":
        return replace(scenes.read(str(source)), licence=licence)
    listing = _list(str(source), Path(images).absolute() if images is not None else None)
    if splits is not None:
        listing = listings.apply_splits(listing, Path(splits))
    if images is not None:
        _check_inside(listing, Path(images).absolute())
    if listing.bad and not listing.entries:
        raise DataError(f"{listing.origin}: nothing in it can be used, first {listing.bad[0]}")
    pairs = collect(listing, strict)
    beside = listing.origin if listing.origin.is_dir() else listing.origin.parent
    licence = licence or listing.licence or read_licence(beside)
    return replace(pairs, licence=licence, notes=pairs.notes + listing.notes)


def _check_inside(listing: Listing, images: Path) -> None:
    """Refuse a listing that names images outside of the folder that the user has given.

    Without that folder a name counts from the listing and may lead anywhere, as may a link.
    """
    packed = getattr(listing.source, "images", ())  # these lie in files of the dataset
    for entry in listing.entries:
        if entry.path not in packed and (".." in entry.path or entry.path.startswith("/")):
            place = os.path.normpath(images / entry.path)
            inside = Path(place).is_relative_to(os.path.normpath(images))
            if not inside and os.path.lexists(place):  # else it is missing, and doctor looks for it
                raise DataError(
                    f"{listing.origin}, {entry.where}: {entry.path} lies outside of --images "
                    f"{images}; give a folder that holds all the images, and names within it"
                )


def _list(source: str, images: Path | None) -> Listing:
    """List the images of a dataset with the reader of its format."""
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: no such folder of images; check --images")
    if source.startswith("hf:"):
        from crosstill.data import parquet  # it and its pyarrow are needed by few

        return parquet.read_hub(source, images)
    fileset = locate(source)
    if fileset.names == (".",):
        return read_photo_folder(fileset.base)
    kinds = sorted({_kind(name) for name in fileset.names})
    known = FORMATS.in_order()
    readers: set[Callable[..., Listing] | None] = {
        FORMATS.find(kind) if kind in known else None for kind in kinds
    }
    if len(readers) > 1:
        raise DataError(f"{source}: files of several kinds ({', '.join(kinds)}); give those of one")
    if (read := readers.pop()) is None:
        hint = "; sentences go with photos: PHOTOS --texts LINES.txt" if ".txt" in kinds else ""
        raise DataError(
            f"{fileset.origin}: not a dataset; give a {', '.join(known)} file, a folder, or scenes"
            + hint
        )
    return read(fileset, images)


def _kind(name: str) -> str:
    """Return a file's ending in lower case, of a compressed archive both: ".tar.gz"."""
    endings = [suffix.lower() for suffix in Path(name).suffixes]
    both = "".join(endings[-2:])
    return both if both.startswith(".tar.") else "".join(endings[-1:])


def reader(record: dict[str, Any]) -> HashedReader:
    """Make the function `Pairs.read` again, from the JSON-able record `Pairs.source`; it pickles.

    Raises:
        DataError: the record is of no form known here.
    """
    form = record.get("form")
    if form not in SOURCES.names():
        raise DataError(f"images of form {form!r} cannot be read; upgrade crosstill")
    return HashedReader(SOURCES.find(form)(record))
