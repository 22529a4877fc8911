"""`crosstill train`: distil a student from a cache."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosstill.cli import common

if TYPE_CHECKING:
    from crosstill.cache import Cache
    from crosstill.students.student import Student


def command(
    cache: Annotated[Path, typer.Argument(help="The cache to learn from.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    student: Annotated[
        str, typer.Option(help="A preset (paper, mobile, tiny, …) or a TOML file.")
    ] = "mobile",
    recipe: Annotated[
        str,
        typer.Option(
            help="A published setting: dsmd, clip_kd, kd, crd, … info_nce; a wrong name lists all."
        ),
    ] = "dsmd",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Distil a student from what a teacher said.

    A run that was interrupted or killed goes on with --resume and ends with the same weights.
    Start it through torchrun to train on several processes.
    """
    from crosstill import recipes

    settings = recipes.config(recipe, changes or [])
    common.hush()
    from crosstill.cache import Cache as Opened
    from crosstill.train import folder, train
    from crosstill.train.distributed import leads

    if not resume:
        folder.check_new(out)  # before a student is fetched or built
    elif folder.is_run(out):
        settings = folder.settings_of(out).changed(changes or [])
    source = Opened(cache)
    # the other processes of torchrun read the student that the first one saves
    made = (
        None
        if resume or not leads()
        else _build(student, source, settings.train_split, settings.seed)
    )
    command_line = shlex.join(["crosstill", *sys.argv[1:]])
    run = train(made, source, settings, out, resume=resume, command=command_line)
    if leads():
        best = run.metrics["best"]
        common.say(f"{out}: best val RSUM {best['rsum']:.2f} at epoch {best['epoch']}")


def _build(student: str, cache: Cache, split: str, seed: int) -> Student:
    from crosstill import students

    return students.build(student, dim=cache.dim, captions=cache.captions(split), seed=seed)
