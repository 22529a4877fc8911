"""`crosstill evaluate`: recall and cost of a model, beside its teacher's."""

from __future__ import annotations

from typing import Annotated

import typer

from crosstill.cli import common


def command(
    model: Annotated[
        str, typer.Argument(help="A run, a student's folder, a teacher's folder or a hub id.")
    ],
    data: common.Data,
    images: common.Images = None,
    split: Annotated[str, typer.Option(help="Which split.")] = "test",
    protocol: Annotated[str, typer.Option(help="full or coco-1k-5fold.")] = "full",
    efficiency: Annotated[bool, typer.Option("--efficiency", help="Also measure latency.")] = False,
    strict: common.Strict = False,
    as_json: common.AsJson = False,
) -> None:
    """Measure the recall of MODEL on a split of DATA.

    A run is shown beside its teacher and its untrained self. Recall is in percent; ties count
    by expected rank.
    """
    common.hush()
    from crosstill import data as sources
    from crosstill.evaluate import compare

    pairs = sources.open(data, images=images, strict=strict).split(split)
    found = compare.run(model, pairs, protocol, efficiency, strict)
    for line in found.notes:
        common.note(line)
    if as_json:
        common.dump(found.to_json())
    else:
        common.say(found.table())
