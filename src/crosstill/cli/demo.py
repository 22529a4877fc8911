"""`crosstill demo`: the whole path on rendered scenes."""

from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common


def command(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
) -> None:
    """Render scenes, train a teacher, cache it, distil a student, and compare the two.

    Nothing is downloaded. Run again in the same folder, it goes on where it was.
    """
    files.check_writable(out)
    common.hush()
    from crosstill import demo

    common.say(demo.run(out))
