"""`crosstill inspect`: what a checkpoint holds, and whether it would load whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crosstill.cli import common
from crosstill.errors import ConfigError


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="A file of weights, a model's folder or a hub id.")
    ],
    family: Annotated[
        str | None, typer.Option(help="Whose names a file has: meter. Found out by default.")
    ] = None,
    student: Annotated[
        bool, typer.Option("--student", help="Look at DCD's student in a METER file.")
    ] = False,
    unpickle: Annotated[
        bool,
        typer.Option("--unpickle", help="Allow a pickled file; only tensors are read from it."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Convert a METER file to a folder, once.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of RoBERTa's tokenizer, for --out.")
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """List the missing and unexpected keys of CHECKPOINT.

    Exits with 1 where there are any. With --out it writes a folder that every verb takes as a
    teacher.
    """
    if (out is None) != (tokenizer is None):
        raise ConfigError("--out and --tokenizer belong together; give both or neither")
    common.hush()
    from crosstill.teachers import inspection

    found = inspection.inspect(checkpoint, family, student, unpickle)
    if as_json:
        common.dump(found.to_json())
    else:
        common.say(found.text())
    if not found.findings.whole:
        raise typer.Exit(1)
    if out is not None and tokenizer is not None:
        inspection.convert(checkpoint, out, tokenizer, student, unpickle)
        common.note(f"written to {out}")
