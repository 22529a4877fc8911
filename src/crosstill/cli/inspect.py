"""`crosstill inspect`: what a checkpoint holds, and whether it would load whole."""

from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common
from crosstill.errors import ConfigError


def command(
    checkpoint: Annotated[
        str, typer.Argument(help="A file of weights, a model's folder or a hub id.")
    ],
    family: Annotated[
        str | None, typer.Option(help="Whose names a file has: beit3 or meter; else found out.")
    ] = None,
    student: Annotated[
        bool, typer.Option("--student", help="Look at DCD's student in a METER file.")
    ] = False,
    unpickle: Annotated[
        bool,
        typer.Option("--unpickle", help="Allow a pickled file; only tensors are read from it."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Convert a BEiT-3 or METER file to a folder, once.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="For --out: BEiT-3's beit3.spm, or the folder of RoBERTa's for METER."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="For --out: pixels of an image's side.", show_default="the file's own"),
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """List the missing and unexpected keys of CHECKPOINT.

    Exits with 1 where there are any. With --out it writes a folder that every verb takes as a
    teacher.
    """
    if (out is None) != (tokenizer is None):
        raise ConfigError("--out and --tokenizer belong together; give both or neither")
    if size is not None and out is None:
        raise ConfigError("--size is of what --out writes; give both or leave it out")
    if out is not None:
        files.check_writable(out)
    common.hush()
    from crosstill.teachers import checkpoints

    inspected = checkpoints.inspect(checkpoint, family, student, unpickle)
    if as_json:
        common.dump(inspected.to_json())
    else:
        common.say(inspected.text())
    if not inspected.findings.whole:
        raise typer.Exit(1)
    if out is not None and tokenizer is not None:
        checkpoints.convert(checkpoint, out, tokenizer, student, unpickle, size)
        common.note(f"written to {out}")
