"""Datasets of the Hugging Face hub, through its own library (the extra `hub`).

The library downloads a dataset once and keeps it as Arrow files in its cache; those are read like
any others, by content and without the library.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from crosstill.data import parquet
from crosstill.data.collection import Listing
from crosstill.data.fileset import FileSet
from crosstill.data.pairs import SPLIT_NAMES
from crosstill.errors import DataError

PREFIX = "hf:"


def read(source: str, images: Path | None) -> Listing:
    """List the dataset "hf:OWNER/NAME" or "hf:OWNER/NAME:CONFIG".

    Raises:
        DataError: no library, no such dataset, no connection, or columns that do not fit.
    """
    name, _, config = source.removeprefix(PREFIX).partition(":")
    loaded = _load(name, config or None)
    files = {
        item["filename"]: SPLIT_NAMES.get(str(split).lower())
        for split, part in loaded.items()
        for item in part.cache_files
    }
    if not files:
        raise DataError(f"{source}: it has no rows on disk; open its files instead")
    base = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    splits = {os.path.relpath(file, base): split for file, split in files.items()}
    known = {file: split for file, split in splits.items() if split}
    listing = parquet.read(FileSet(base, tuple(splits)), images, known)
    licence = next(iter(loaded.values())).info.license or None
    return listing._replace(name=name, licence=licence)


def _load(name: str, config: str | None) -> dict[str, Any]:
    try:
        datasets: Any = import_module("datasets")
    except ImportError:
        raise DataError(
            f'{PREFIX}{name}: needs the library datasets: pip install "crosstill[hub]"'
        ) from None
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the library's, the hub's and the network's have no common root
        reason = " ".join(str(error).split())
        raise DataError(
            f"{PREFIX}{name}: cannot be loaded ({type(error).__name__}: {reason:.200}); check the "
            "name and the connection"
        ) from None
    return dict(loaded)
