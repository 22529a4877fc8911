"""All that a run's report shows, read and measured; nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosstill.cache import Cache, Split
from crosstill.cache.store import HEADER
from crosstill.errors import CrosstillError, InputError, MismatchError
from crosstill.evaluate import (
    CachedSplit,
    Evaluation,
    efficiency,
    open_encoder,
    teacher_recall,
)
from crosstill.evaluate.recall import DEPTHS, retrieval
from crosstill.report import events
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher
from crosstill.train import Run
from crosstill.types import Features


@dataclass
class Gathered:
    """What is known of a finished run.

    Attributes:
        record: the run's config.json.
        rows: "teacher" (if there was one), "student" and "untrained", on `split`.
        seen: the features of "teacher" and "student".
        notes: what could not be shown, and why.
    """

    run: Run
    record: dict[str, Any]
    cache: Cache
    split: Split
    log: events.Events
    licences: dict[str, str | None]
    rows: dict[str, Evaluation] = field(default_factory=dict)
    seen: dict[str, Features] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One sentence."""
        student, teacher = self.rows["student"], self.rows.get("teacher")
        where = f"on the {len(self.split.images):,} images of the split {self.split.name!r}"
        if teacher is None:
            return (
                f"The student has {student.parameters:,} parameters and an RSUM of "
                f"{student.recall.rsum:.2f} {where}; there is no teacher to compare it with."
            )
        share = student.recall.rsum / teacher.recall.rsum if teacher.recall.rsum else 0.0
        figures = f"{where}: {student.recall.rsum:.2f} against {teacher.recall.rsum:.2f}"
        if not teacher.parameters:
            return f"The student has {share:.0%} of the teacher's RSUM {figures}."
        size = (student.parameters or 0) / teacher.parameters
        return (
            f"The student has {size:.0%} of the teacher's parameters and {share:.0%} of its RSUM "
            f"{figures}."
        )


def run(folder: Path, latency: bool) -> Gathered:
    """Read a run, encode its validation split with its student, and measure.

    Raises:
        InputError: the run is not finished, or its cache is gone.
        MismatchError: the cache is not the one that the run learnt from.
    """
    opened = Run(folder)
    record = opened.config
    if not (folder / "metrics.json").is_file():
        raise InputError(
            f"{folder}: the run is not finished; finish it with "
            f"`crosstill train {record['cache']['folder']} --out {folder} --resume`"
        )
    cache = open_cache(folder, record)
    best = opened.best
    split = cache.split(record["settings"]["val_split"])
    found = Gathered(opened, record, cache, split, events.read(folder), best.licences)
    _teacher(found)
    frozen = record["settings"]["freeze"]
    seen, row = _measure(best, cache, split, frozen)
    found.seen["student"] = seen
    found.rows["student"] = row.renamed(f"student ({best.name})")
    found.rows["untrained"] = _measure(opened.untrained, cache, split, frozen)[1].renamed(
        "student, untrained"
    )
    _warn(found)
    if latency:
        _latency(found, best)
    return found


def open_cache(folder: Path, record: dict[str, Any]) -> Cache:
    """The cache that a run learnt from, whole and unchanged."""
    place = Path(record["cache"]["folder"])
    if not (place / HEADER).is_file():
        raise InputError(
            f"{folder} learnt from the cache {place}, which is gone; put it back there, "
            "the report needs its features"
        )
    cache = Cache(place)
    if cache.digest != record["cache"]["digest"]:
        raise MismatchError(
            f"{place} is no longer the cache that {folder} learnt from; put that one back, "
            "the report needs its features"
        )
    return cache


def _teacher(found: Gathered) -> None:
    """The teacher's row and features, from the cache."""
    cache, split = found.cache, found.split
    recall = teacher_recall(cache, split)
    if recall is None:
        left = " and ".join(sorted(cache.modalities)) or "no"
        found.notes.append(f"No teacher's row, space or finds: the cache holds {left} features.")
        return
    name = Path(str(cache.teacher["name"])).name
    found.rows["teacher"] = Evaluation(f"teacher ({name})", recall, cache.teacher["parameters"])
    found.seen["teacher"] = Features(
        cache.image_features(split.images), cache.text_features(split.captions)
    )


def _measure(
    student: Student, cache: Cache, split: Split, frozen: str
) -> tuple[Features, Evaluation]:
    """A student's features of the plain photos of a split, and its recall."""
    encoded = CachedSplit(cache, split, student, frozen)
    seen = encoded.features(student)
    recall = retrieval(*seen, encoded.owner)
    return seen, Evaluation(student.name, recall, student.parameter_count())


def _warn(found: Gathered) -> None:
    images = len(found.split.images)
    if images <= DEPTHS[-1]:
        found.notes.append(f"Only {images} images: recall at {DEPTHS[-1]} is 100 for any model.")
    for row in found.rows.values():
        if row.recall.warning:
            found.notes.append(f"{row.name}: {row.recall.warning}.")


def _latency(found: Gathered, student: Student) -> None:
    """Milliseconds of the student and, where it can still be opened, of its teacher."""
    models: dict[str, Teacher] = {"student": student}
    try:
        if "teacher" in found.rows:
            models["teacher"] = _open_teacher(found.cache.teacher)
    except CrosstillError as error:
        found.notes.append(f"The teacher's latency was not measured: {error}.")
    for role, cost in efficiency.measure(models).items():
        found.rows[role] = replace(found.rows[role], efficiency=cost)


def _open_teacher(record: dict[str, Any]) -> Teacher:
    """The very model that filled the cache; a report downloads nothing."""
    source = record["source"]
    if source is None or not Path(source).is_dir():
        raise InputError(f"{source or record['name']} is not on this machine")
    model = open_encoder(source)
    if model.identity() != record["identity"]:
        raise MismatchError(f"{source} has changed since it filled the cache")
    return model
