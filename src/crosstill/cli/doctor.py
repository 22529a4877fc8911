"""`crosstill doctor`: is this machine ready, is this dataset sound?"""

from __future__ import annotations

from typing import Annotated

import typer

from crosstill.cli import common


def command(
    data: Annotated[str | None, typer.Argument(help=common.DATA)] = None,
    images: common.Images = None,
    model: Annotated[
        str | None, typer.Option(help="Count the captions that this model would cut.")
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Describe the machine and, given DATA, dry-run the dataset: every image is decoded."""
    common.hush()
    from crosstill import doctor

    found = doctor.examine(data, images, model)
    if as_json:
        common.dump(found)
    else:
        common.say(doctor.text(found))
