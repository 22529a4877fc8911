"""Opening of models: whatever a user calls a model, and the record of the run that made it."""

from pathlib import Path
from typing import Any, Literal, overload

import torch

from crosstill import artefacts, files, students, teachers
from crosstill.errors import CorruptError, ModelError
from crosstill.students.student import RECORD, Student
from crosstill.teachers import dual
from crosstill.teachers.base import Model, PairModel, Teacher

CONFIG = "config.json"
FORMAT = 3  # 1 did not keep the order of the losses, 2 had other defaults of losses

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
        if model.source and dual.has_heads(Path(model.source)):
            return dual.load(Path(model.source), model.name, device)
        raise ModelError(
            f"{source}: a fusion model, which reads pairs and has no embeddings; give a dual "
            "encoder here, and the fusion model to `crosstill evaluate` or as a teacher of scores"
        )
    return model


def open_student(source: str | Path) -> Student | None:
    """Open a student's folder, a run's best student, or RUN@64; None where there is none."""
    folder, width = split_width(source)
    for candidate in (folder, folder / "best"):
        if (candidate / RECORD).is_file():
            student = students.load(candidate)
            return student if width is None else students.shorten(student, width)
    return None


def _open(source: str | Path, device: torch.device | None) -> Model:
    student = open_student(source)
    if student is not None:
        return student if device is None else student.to(device)
    if artefacts.is_cache(split_width(source)[0]):
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


class _Cache(artefacts.Record):
    folder: str
    digest: str


class _Teacher(artefacts.Record):
    name: str | None = None  # of none, where a run had no teacher
    source: str | None = None
    licence: str | None = None
    kind: str | None = None
    modalities: list[str] | None = None


class _Data(artefacts.Record):
    name: str
    licence: str | None = None


class _Record(artefacts.Record):
    settings: dict[str, Any]  # crosstill.train.config says which there are
    losses: list[str] | None = None
    cache: _Cache
    teacher: _Teacher
    data: _Data
    command: str
    versions: dict[str, str]


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `config.json` says of a run, which a stranger may have made.

    Its settings are not checked.

    Raises:
        CorruptError: it is missing, a link or damaged, a newer crosstill wrote it, or a field is
            not what it should be.
    """
    path = artefacts.member(folder, CONFIG)
    if not path.is_file():
        raise CorruptError(f"{path}: the file is missing; restore it from a copy")
    return artefacts.read(path, _Record, {1, 2, FORMAT}).model_dump()
