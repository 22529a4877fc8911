"""`crosstill train`: distil a student from a cache."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosstill import files
from crosstill.cli import common
from crosstill.errors import ConfigError

if TYPE_CHECKING:
    from crosstill.students.student_config import FusionConfig, StudentConfig
    from crosstill.train import Run


def command(
    cache: Annotated[Path, typer.Argument(help="The cache to learn from.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    student: Annotated[
        str | None,
        typer.Option(
            help="A preset (paper, mobile, tiny, …), a TOML file, or, of a score cache, half: its "
            "teacher with half the fusion layers. [default: mobile]"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="recommended, or a published setting: dsmd, clip_kd, crd, … info_nce; a wrong "
            "name lists all. [default: recommended]"
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,3,5",
            help="In place of --student: these fusion layers of the score cache's teacher.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Distil a student from what a teacher said.

    A run that was interrupted or killed goes on with --resume and ends with the same weights.
    Start it through torchrun to train on several processes.
    """
    if layers is not None and student is not None:
        raise ConfigError("--layers is itself a student, the teacher cut; leave --student out")
    if resume and (student or layers):
        raise ConfigError("--resume: a run keeps its student; leave --student and --layers out")
    common.check_cache(cache)
    files.check_writable(out)
    from crosstill import recipes

    recipes.choose(recipe, changes or [], out if resume else None)  # for its refusals
    common.hush()
    from crosstill import students
    from crosstill.train.distributed import leads

    learner: str | FusionConfig | StudentConfig | None = student or "mobile"
    if layers is not None:
        learner = students.load_config("half").model_copy(update={"layers": _numbers(layers)})
    run = recipes.distill(
        None if resume else learner,
        cache,
        recipe,
        changes=changes or [],
        out=out,
        resume=resume,
        command=shlex.join(["crosstill", *sys.argv[1:]]),
    )
    if leads():
        common.say(f"{out}: {run.summary()}")
        common.note(_next(run))


def _next(run: "Run") -> str:
    """List what one does with a finished run, as commands."""
    folder = shlex.quote(str(run.folder))
    lines = [f"crosstill report {folder}", f"crosstill evaluate {folder} DATA --images DIR"]
    if run.trains_dual:
        lines.append(f"crosstill export {folder} --to onnx --out {folder}-onnx")
    return "\n".join(["Now:", *(f"  {line}" for line in lines)])


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers {text}: write numbers with commas between, as 0,3,5") from None
