"""`crosstill doctor`: is this machine ready, is this dataset sound?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common


def command(
    data: Annotated[str | None, typer.Argument(help=common.DATA)] = None,
    images: common.Images = None,
    splits: common.Splits = None,
    model: Annotated[
        str | None, typer.Option(help="Count the captions that this model would cut.")
    ] = None,
    mend: Annotated[
        Path | None,
        typer.Option(
            help="Where files are missing: write a listing of those found, to this file.",
            metavar="JSON",
        ),
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Describe the machine and, given DATA, dry-run the dataset: every image is decoded.

    What is wrong with the dataset is said with what to do about it: files that are not where
    they are listed, leaks between splits, unreadable images, captions that stand out.
    """
    if data is not None:
        common.check_data(data)
    if mend is not None:
        files.check_writable(mend.parent)
    common.hush()
    from crosstill import doctor

    found = doctor.examine(data, images, model, mend, splits)
    if as_json:
        common.dump(found.to_json())
    else:
        common.say(found.text())
    if found.error is not None:
        raise found.error
