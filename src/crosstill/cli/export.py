"""`crosstill export`: a student as files that other software opens."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from crosstill import files
from crosstill.cli import common
from crosstill.errors import ConfigError
from crosstill.export import MAX_LOSS

Source = Annotated[Path, typer.Argument(help="A run, or a student's folder.")]
Form = Annotated[
    str,
    typer.Option(
        "--to", help="onnx (for index, search, serve), sentence-transformers, or transformers."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder to make; an earlier export there is replaced.")]
Int8 = Annotated[
    bool, typer.Option("--int8", help="With onnx: 8-bit matrix products and embeddings.")
]
MaxLoss = Annotated[
    float, typer.Option(help="With --int8: share of the validation RSUM that may be lost.")
]
Data = Annotated[
    str | None, typer.Option(help=f"What to measure on; else the run's own val. {common.DATA}")
]
TeacherLicence = Annotated[
    str | None, typer.Option(help="The teacher's licence, where its card does not say.")
]
DataLicence = Annotated[str | None, typer.Option(help="The licence of photos and captions.")]


def command(
    source: Source,
    out: Out,
    to: Form = "onnx",
    int8: Int8 = False,
    max_loss: MaxLoss = MAX_LOSS,
    data: Data = None,
    images: common.Images = None,
    splits: common.Splits = None,
    split: Annotated[str, typer.Option(help="With --data: which split.")] = "val",
    teacher_licence: TeacherLicence = None,
    data_licence: DataLicence = None,
) -> None:
    """Export the student of SOURCE; the export is kept only if it passes its gates.

    fp32 rows have to be the student's, and 8 bits may cost no more than --max-loss. The model
    card lists recall, teacher, data and licences.
    """
    if data is None and (images is not None or splits is not None or split != "val"):
        raise ConfigError(
            "--images, --splits and --split say where --data is measured; give --data too"
        )
    if data is not None:
        common.check_data(data)
    files.check_writable(out)
    common.hush()
    from crosstill import data as sources
    from crosstill import export

    pairs = sources.open(data, images=images, splits=splits).split(split) if data else None
    exported = export.run(
        source,
        to,
        out,
        int8=int8,
        max_loss=max_loss,
        pairs=pairs,
        split=split,
        teacher_licence=teacher_licence,
        data_licence=data_licence,
        command=shlex.join(["crosstill", *sys.argv[1:]]),
    )
    for line in exported.lines:
        common.note(line)
    common.say(str(exported.folder))
