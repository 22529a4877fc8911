"""Open whatever a user may call a model."""

from __future__ import annotations

from pathlib import Path

from crosstill import artefacts, files, students, teachers
from crosstill.cache import is_cache
from crosstill.errors import ModelError
from crosstill.students.student import RECORD, Student
from crosstill.teachers import fusion
from crosstill.teachers.base import Teacher
from crosstill.teachers.features import FeaturesTeacher
from crosstill.teachers.matcher import Matcher


def open_model(source: str | Path) -> Student | Teacher | FeaturesTeacher | Matcher:
    """A run folder (its best student), a student folder, a teacher folder or a hub id.

    RUN@64 is the student of a run, or a student, cut to embeddings of 64 numbers.

    Raises:
        ModelError: nothing there can be loaded; the message says what was missing.
    """
    folder, width = split_width(source)
    for candidate in (folder, folder / "best"):
        if (candidate / RECORD).is_file():
            student = students.load(candidate)
            return student if width is None else students.shorten(student, width)
        if fusion.find(candidate):
            return teachers.load(candidate)
    if is_cache(folder):
        raise ModelError(f"{source}: a cache, not a model; give a run, a student or a teacher")
    return teachers.load(str(source))


def cuts(source: str | Path) -> list[str]:
    """RUN@32, RUN@64, … for the smaller widths that a student has learnt; else nothing."""
    for folder in (Path(source), Path(source) / "best"):
        if (folder / RECORD).is_file():
            with artefacts.readable(folder / RECORD):
                config = files.read_json(folder / RECORD)["config"]
                dim, widths = config["dim"], config.get("widths", ())
                return [f"{source}@{width}" for width in reversed(widths) if width != dim]
    return []


def split_width(source: str | Path) -> tuple[Path, int | None]:
    """RUN@64 as RUN and 64, unless a folder is called that."""
    name, _, width = str(source).rpartition("@")
    if width.isdecimal() and Path(name).is_dir() and not Path(source).exists():
        return Path(name), int(width)
    return Path(source), None


def open_live(source: str | Path) -> Student | Teacher | Matcher:
    """As `open_model`, for those who need a model that runs, not a folder of its vectors."""
    model = open_model(source)
    if isinstance(model, FeaturesTeacher):
        raise ModelError(f"{source}: vectors without a model; cache them and train a student")
    return model


def open_encoder(source: str | Path) -> Student | Teacher:
    """As `open_live`, for those who need embeddings of one side alone.

    BLIP's dual heads serve here, though the model is a fusion model.
    """
    model = open_live(source)
    if isinstance(model, Matcher):
        heads = model.source and fusion.load_dual(
            Path(model.source), model.name, None, fusion.FINDERS
        )
        if heads:
            return heads
        raise ModelError(
            f"{source}: a fusion model, which reads pairs and has no embeddings; give a dual "
            "encoder here, and the fusion model to `crosstill evaluate` or as a teacher of scores"
        )
    return model


def open_matcher(source: str | Path) -> Matcher:
    """As `open_live`, for those who need a model that reads image and text together."""
    model = open_live(source)
    if not isinstance(model, Matcher):
        raise ModelError(
            f"{source}: a dual encoder, which does not read pairs; give a fusion model here "
            "(METER, ViLT, BLIP, BridgeTower, or a run whose student is one)"
        )
    return model
