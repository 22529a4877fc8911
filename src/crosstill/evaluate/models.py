"""Open whatever a user may call a model."""

from __future__ import annotations

from pathlib import Path

from crosstill import students, teachers
from crosstill.cache.store import HEADER
from crosstill.errors import ModelError
from crosstill.students.student import RECORD, Student
from crosstill.teachers.base import Teacher
from crosstill.teachers.features import FeaturesTeacher


def open_model(source: str | Path) -> Student | Teacher | FeaturesTeacher:
    """A run folder (its best student), a student folder, a teacher folder or a hub id.

    Raises:
        ModelError: nothing there can be loaded; the message says what was missing.
    """
    folder = Path(source)
    for candidate in (folder, folder / "best"):
        if (candidate / RECORD).is_file():
            return students.load(candidate)
    if (folder / HEADER).is_file():
        raise ModelError(f"{source}: a cache, not a model; give a run, a student or a teacher")
    return teachers.load(str(source))


def open_encoder(source: str | Path) -> Student | Teacher:
    """As `open_model`, for those who need a model that runs, not a folder of its vectors."""
    model = open_model(source)
    if isinstance(model, FeaturesTeacher):
        raise ModelError(f"{source}: vectors without a model; cache them and train a student")
    return model
