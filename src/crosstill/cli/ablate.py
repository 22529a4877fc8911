"""`crosstill ablate`: a table of the paper on your own data."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common


def command(
    table: Annotated[
        str,
        typer.Argument(
            help="table2, table4 to table10 (of the DSMD paper), towers, or, of a score cache, dcd."
        ),
    ],
    cache: Annotated[Path, typer.Argument(help="The cache that every row learns from.")],
    out: Annotated[Path, typer.Option(help="Folder of the grid; tables in it share runs.")],
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset or a TOML file; for towers once for each row. By default mobile, for "
            "dcd half."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs a row, with the seeds 0, 1, …", min=1)] = 3,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every run.", min=1)] = None,
    freeze: Annotated[
        str | None, typer.Option(help="image or text: keep that tower as it is, which is cheap.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every row."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time; by default one a GPU, or one.", min=1)
    ] = None,
) -> None:
    """Train every row of TABLE with several seeds, and print mean, spread and what chance could do.

    Stopped or killed, the same command goes on where it was.
    """
    common.check_cache(cache)
    files.check_writable(out)
    common.hush()
    from crosstill import ablate
    from crosstill import cache as caches
    from crosstill.ablate import plan

    sugar = [f"epochs={epochs}"] if epochs else []
    sugar += [f"freeze={freeze}"] if freeze else []
    typed = shlex.join(["crosstill", *sys.argv[1:]])
    source = caches.open(cache)
    made = plan.make(table, source, student or [], [*sugar, *(changes or [])], range(seeds), typed)
    finished = ablate.fill(made, source, out, workers)
    common.say(ablate.markdown(finished))
