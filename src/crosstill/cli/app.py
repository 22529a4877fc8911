"""The verbs under one name, and what every one of them does with an error."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from crosstill import files
from crosstill.cli import (
    ablate,
    cache,
    common,
    demo,
    doctor,
    evaluate,
    export,
    index,
    inspect,
    join,
    report,
    search,
    serve,
    train,
)
from crosstill.errors import CrosstillError

app = typer.Typer(
    name="crosstill",
    help="Distil a large vision-language teacher into a small, fast dual encoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

GOES_ON = {
    "cache": "; the same command goes on where it was",
    "join": "; the same command goes on where it was",
    "ablate": "; the same command goes on where it was",
    "index": "; the same command goes on where it was",
}


def _goes_on(verb: str, options: dict[str, Any]) -> str:
    """Return how to go on after an interruption."""
    if verb == "train":
        begun = (options["out"] / "config.json").is_file()
        return (
            f"; the same command {'with --resume goes on where it was' if begun else 'starts it'}"
        )
    return GOES_ON.get(verb, "")


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """Run the verb with every expected error as one line: exit codes 1, 2 and 130."""

    @functools.wraps(verb)
    def run(**options: Any) -> None:
        place = Path(options.get("out") or ".")
        try:
            with files.writing(place):  # what writes by a path of its own tells that itself
                verb(**options)
        except CrosstillError as error:
            common.note(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            common.note(f"error: {where}{error.strerror or error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            common.note(f"interrupted{_goes_on(verb.__module__.rpartition('.')[2], options)}")
            raise typer.Exit(130) from None

    return run


VERBS = (
    cache,
    join,
    train,
    evaluate,
    ablate,
    report,
    export,
    index,
    search,
    serve,
    demo,
    doctor,
    inspect,
)

for module in VERBS:
    app.command(module.__name__.rpartition(".")[2])(_guarded(module.command))


def main() -> None:
    """Run one verb."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("crosstill").setLevel(logging.INFO)
    warnings.simplefilter("ignore")  # other libraries' notes to developers; ours are log lines
    app()
