"""`crosstill evaluate`: recall and cost of a model, beside its teacher's."""

from pathlib import Path
from typing import Annotated

import typer

from crosstill.cli import common

PROTOCOL = (
    "full; karpathy: a caption is true of its own image alone, though others have the same; "
    "coco-1k-5fold."
)
Model = Annotated[
    str,
    typer.Argument(
        help="A run, a student's folder, a bundle, a teacher's folder (dual encoder or fusion "
        "model), or a hub id."
    ),
]
Beside = Annotated[
    list[str] | None, typer.Option(help="Another model, as a row below; as often as you like.")
]
Efficiency = Annotated[
    bool, typer.Option("--efficiency", help="Also measure latency, and seconds for the split.")
]
Sample = Annotated[
    int | None,
    typer.Option(help="With --efficiency: time fusion models on so many pairs, without recall."),
]
Finder = Annotated[
    str | None, typer.Option(help="A dual encoder whose finds MODEL, a fusion model, re-ranks.")
]
Top = Annotated[
    int | None,
    typer.Option(help="With --finder: how many candidates of each query to re-rank; 20."),
]

Blend = Annotated[
    float | None,
    typer.Option(
        metavar="TEMPERATURE",
        help="With --finder: add its cosine over this temperature to MODEL's score.",
    ),
]

Truth = Annotated[
    list[Path] | None,
    typer.Option(
        help="Extended ground truth of COCO's test split: eccv_image_to_caption.json, CxC's "
        "sits_test.csv; as often as you like."
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(
        help="With --truth: captions with COCO's ids, captions_val2014.json or dataset_coco.json. "
        "[default: DATA]"
    ),
]


def command(
    model: Model,
    data: common.Data,
    images: common.Images = None,
    splits: common.Splits = None,
    split: Annotated[str, typer.Option(help="Which split.")] = "test",
    protocol: Annotated[str, typer.Option(help=PROTOCOL)] = "full",
    beside: Beside = None,
    efficiency: Efficiency = False,
    sample: Sample = None,
    finder: Finder = None,
    top: Top = None,
    blend: Blend = None,
    truth: Truth = None,
    annotations: Annotations = None,
    strict: common.Strict = False,
    as_json: common.AsJson = False,
) -> None:
    """Measure the recall of MODEL on a split of DATA.

    A run is shown beside its teacher and its untrained self. Recall is in percent; ties count
    by expected rank. Seconds are those of one thread for all scores of the split.
    """
    common.check_data(data)
    common.hush()
    from crosstill import data as sources
    from crosstill import evaluate

    pairs = sources.open(data, images=images, strict=strict, splits=splits).split(split)
    options = evaluate.Options(
        protocol=protocol,
        efficiency=efficiency,
        strict=strict,
        beside=beside or (),
        sample=sample,
        truths=truth or (),
        annotations=annotations or Path(data),
        finder=finder,
        top=top,
        blend=blend,
    )
    result = evaluate.measure(model, pairs, options)
    for line in result.notes:
        common.note(line)
    if as_json:
        common.dump(result.to_json())
    else:
        common.say(result.table())
