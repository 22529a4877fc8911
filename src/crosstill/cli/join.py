"""`crosstill join`: several teachers' caches of one dataset as one."""

from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common
from crosstill.errors import ConfigError


def command(
    caches: Annotated[
        list[Path], typer.Argument(help="Feature caches of the same data under other teachers.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the joined cache.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="1,0.5", help="How much each teacher counts. [default: all the same]"),
    ] = None,
) -> None:
    """Join CACHES into one, whose cosines are the weighted means of the teachers' cosines.

    It is trained from as any other.
    """
    for folder in caches:
        common.check_cache(folder)
    files.check_writable(out)
    common.hush()
    from crosstill import cache

    made = cache.join(caches, out, None if weights is None else _numbers(weights))
    parts = ", ".join(f"{p['name']} ({p['dim']} × {p['weight']:g})" for p in made.teacher["parts"])
    common.quarantine_note(out / "quarantine.jsonl")
    common.say(
        f"{out}: {len(made.image_ids):,} images, {common.texts(made)}, "
        f"{' and '.join(sorted(made.modalities))} features, {made.dim} wide, of {parts}"
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {text}: write numbers with commas between, as 1,0.5"
        ) from None
