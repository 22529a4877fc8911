"""Opening of models: one function for anything that a user calls a model."""

from pathlib import Path
from typing import Any, Literal, overload

import torch

from crosstill import artefacts, files, students, teachers
from crosstill.cache import is_cache
from crosstill.errors import ModelError
from crosstill.students.student import RECORD
from crosstill.teachers import heads
from crosstill.teachers.base import Model, PairModel, Teacher

Want = Literal["any", "live", "encoder", "matcher"]


@overload
def open(
    source: str | Path, want: Literal["encoder"], device: torch.device | None = None
) -> Teacher: ...


@overload
def open(
    source: str | Path, want: Literal["matcher"], device: torch.device | None = None
) -> PairModel: ...


@overload
def open(
    source: str | Path,
    want: Literal["any", "live"] = "any",
    device: torch.device | None = None,
) -> Model: ...


def open(source: str | Path, want: Want = "any", device: torch.device | None = None) -> Any:
    """Open a model.

    Args:
        source: a run (its best student), a student's folder, an exported bundle, a folder of
            vectors, or any teacher that `crosstill.teachers.load` knows. RUN@64 is the student of
            a run, or a student, cut to embeddings of 64 numbers.
        want: "any"; "live", a model that runs and not a folder of its vectors; "encoder", one that
            embeds images and texts, for which the contrastive heads of a BLIP serve too; or
            "matcher", one that reads image and text together.
        device: where a teacher computes; None takes a GPU when there is one. A student stays on
            the CPU unless a device is given.

    Returns:
        a model whose `kind` says what it can do: see `crosstill.teachers.base.Model`.

    Raises:
        ModelError: nothing there can be loaded, or it is not what is wanted; the message says why.
    """
    model = _open(source, device)
    if want != "any" and model.kind == "vectors":
        raise ModelError(f"{source}: vectors without a model; cache them and train a student")
    if want == "matcher" and model.kind != "matcher":
        raise ModelError(
            f"{source}: a dual encoder, which does not read pairs; give a fusion model here "
            "(METER, ViLT, BLIP, BridgeTower, or a run whose student is one)"
        )
    if want == "encoder" and model.kind != "encoder":
        if model.source and heads.has_heads(Path(model.source)):
            return heads.load(Path(model.source), model.name, device)
        raise ModelError(
            f"{source}: a fusion model, which reads pairs and has no embeddings; give a dual "
            "encoder here, and the fusion model to `crosstill evaluate` or as a teacher of scores"
        )
    return model


def _open(source: str | Path, device: torch.device | None) -> Model:
    folder, width = split_width(source)
    for candidate in (folder, folder / "best"):
        if (candidate / RECORD).is_file():
            student = students.load(candidate)
            student = student if device is None else student.to(device)
            return student if width is None else students.shorten(student, width)
    if is_cache(folder):
        raise ModelError(f"{source}: a cache, not a model; give a run, a student or a teacher")
    model: Model = teachers.load(str(source), device)
    return model


def cuts(source: str | Path) -> list[str]:
    """List RUN@32, RUN@64, … for the smaller widths that a student has learnt."""
    for folder in (Path(source), Path(source) / "best"):
        if (folder / RECORD).is_file():
            with artefacts.readable(folder / RECORD):
                config = files.read_json(folder / RECORD)["config"]
                dim, widths = config["dim"], config.get("widths", ())
                return [f"{source}@{width}" for width in reversed(widths) if width != dim]
    return []


def split_width(source: str | Path) -> tuple[Path, int | None]:
    """Split RUN@64 into RUN and 64, unless a folder is called that."""
    name, _, width = str(source).rpartition("@")
    if width.isdecimal() and Path(name).is_dir() and not Path(source).exists():
        return Path(name), int(width)
    return Path(source), None
