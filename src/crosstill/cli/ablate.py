"""`crosstill ablate`: a table of the paper on your own data."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common
from crosstill.errors import ConfigError


def command(
    table: Annotated[
        str,
        typer.Argument(
            help="table2 to table10 (of the DSMD paper), towers, or, of a score cache, dcd; table3 "
            "trains nothing and times teacher and student."
        ),
    ],
    cache: Annotated[Path, typer.Argument(help="The cache that every row learns from.")],
    out: Annotated[Path, typer.Option(help="Folder of the grid; tables in it share runs.")],
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset or a TOML file; for towers and table3 once for each row. By default "
            "mobile, for dcd half."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Runs a row, with the seeds 0, 1, …", min=1, show_default="3"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every run.", min=1)] = None,
    freeze: Annotated[
        str | None,
        typer.Option(help="image, text or both: keep that tower as it is, which is cheap."),
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
    from crosstill.ablate import efficiency, plan

    typed = shlex.join(["crosstill", *sys.argv[1:]])
    source = caches.open(cache)
    if table == efficiency.NAME:
        given = {
            "--seeds": seeds,
            "--epochs": epochs,
            "--freeze": freeze,
            "--set": changes,
            "--workers": workers,
        }
        for option in (option for option, value in given.items() if value):
            raise ConfigError(f"{option}: {table} trains nothing; leave it out")
        costs = efficiency.measure(source, student or ["mobile"], typed)
        costs.save(out)
        common.say(costs.markdown())
        return
    sugar = [f"epochs={epochs}"] if epochs else []
    sugar += [f"freeze={freeze}"] if freeze else []
    every = [*sugar, *(changes or [])]
    made = plan.make(table, source, student or [], every, range(seeds or 3), typed)
    finished = ablate.fill(made, source, out, workers)
    common.say(ablate.markdown(finished))
