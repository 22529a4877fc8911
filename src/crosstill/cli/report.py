"""`crosstill report`: a page that shows what a run or a grid came to."""

from pathlib import Path
from typing import Annotated

import typer

from crosstill.cli import common


def command(
    source: Annotated[Path, typer.Argument(help="Folder of a finished run or of a grid.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; the run's or grid's own folder if not given."),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time a run's teacher and student.")
    ] = True,
) -> None:
    """Write report.html, with tables beside it, of a run or a grid.

    The page needs no network and no other file: send it to anyone.
    """
    from crosstill import report

    report.check(source, out)
    common.hush()
    common.say(str(report.write(source, out, latency=latency)))
