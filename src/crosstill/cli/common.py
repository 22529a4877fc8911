"""Options that several verbs share, and how verbs speak."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosstill import files
from crosstill.errors import DataError, DiskFullError, InputError, printable

if TYPE_CHECKING:
    from crosstill.cache import CacheBase

# control codes but for tabs and new lines, marks that turn the writing round, stray bytes
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

DATA = (
    "Karpathy's or COCO's JSON, CSV, TSV, JSONL, Parquet, tar shards (several with commas, "
    "wildcards or {000..009}), a folder of these or of images with .txt captions, "
    "hf:OWNER/NAME, or scenes[:COUNT[:SEED]]."
)

Data = Annotated[str, typer.Argument(help=DATA)]
Images = Annotated[
    Path | None, typer.Option(help="Folder of the image files, where it is not DATA's own.")
]
Splits = Annotated[
    Path | None, typer.Option(help="Karpathy's JSON, which says the split of each image of DATA.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def say(text: str) -> None:
    """Print a result, on stdout."""
    _print(_harmless(text))


def note(text: str) -> None:
    """Print anything that is not a result, on stderr."""
    typer.echo(_harmless(text), err=True)


def _harmless(text: str) -> str:
    """Escape what a terminal would obey, as names and captions in the text may hold it."""
    return _UNSAFE.sub(lambda match: printable(match[0]), text)


def dump(value: Any) -> None:
    """Print a result as JSON, on stdout."""
    _print(json.dumps(value, indent=1))


def _print(text: str) -> None:
    try:
        with files.writing(Path("/dev/stdout")):
            typer.echo(text)
    except DiskFullError:
        # Python would try the rest of its buffer again at the end, and complain by itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def hush() -> None:
    """Keep other libraries' progress bars and advice out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_data(source: str) -> None:
    """Refuse a dataset that is not there, before libraries are loaded, which takes seconds.

    Patterns, rendered scenes and the hub's datasets are left to `crosstill.data`.

    Raises:
        DataError: no such file or folder.
    """
    plain = not re.search(r"[,*?\[{:]", source) and source != "scenes"
    if plain and not os.path.exists(source):
        raise DataError(f"{os.path.abspath(source)}: no such file or folder; give a dataset")


def check_cache(folder: Path) -> None:
    """Refuse a folder without a finished cache, before libraries are loaded.

    Raises:
        InputError: there is none.
    """
    from crosstill.artefacts import is_cache  # which loads numpy, too slow for --help

    if not is_cache(folder):
        raise InputError(f"{folder}: no finished cache there; make one with `crosstill cache`")


def texts(cache: CacheBase) -> str:
    """Count the texts of a cache, in words."""
    loose = f" and {cache.loose:,} loose texts" if cache.loose else ""
    return f"{len(cache.texts) - cache.loose:,} captions{loose}"


def quarantine_note(path: Path) -> None:
    """Say how many images a quarantine.jsonl lists; never leave any out silently."""
    from crosstill import pixels  # which loads numpy, too slow for --help

    if left_out := pixels.count_left_out(pixels.read_classes(path)):
        note(f"{left_out}, listed in {path}")
