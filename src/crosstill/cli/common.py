"""Options that several verbs share, and how verbs speak."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

DATA = (
    "A Karpathy JSON, a CSV or TSV, a folder of images with .txt captions, "
    "or scenes[:COUNT[:SEED]]."
)

Data = Annotated[str, typer.Argument(help=DATA)]
Images = Annotated[
    Path | None, typer.Option(help="Folder of the image files, where it is not DATA's own.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def say(text: str) -> None:
    """A result, on stdout."""
    typer.echo(text)


def note(text: str) -> None:
    """Anything that is not a result, on stderr."""
    typer.echo(text, err=True)


def dump(value: Any) -> None:
    """A result as JSON, on stdout."""
    typer.echo(json.dumps(value, indent=1))


def hush() -> None:
    """Keep other libraries' progress bars and advice out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quarantine_note(count: int, where: str) -> None:
    """Say that images were left out; never silently."""
    if count:
        note(f"unreadable images left out: {count}, listed in {where}")
