"""All that a run's report shows, read and measured; nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crosstill.cache import Cache, CacheBase, ScoreCache, Split
from crosstill.errors import CrosstillError, InputError, MismatchError
from crosstill.evaluate import (
    CachedSplit,
    Evaluation,
    efficiency,
    teacher_recall,
)
from crosstill.evaluate.recall import DEPTHS, Retrieval, retrieval
from crosstill.fusion.matcher import Matcher
from crosstill.models import open as open_model
from crosstill.report import events
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher
from crosstill.train import Run, matched
from crosstill.train import folder as runs
from crosstill.train.config import parse
from crosstill.types import Features


@dataclass
class Gathered:
    """What is known of a finished run.

    Attributes:
        record: the run's config.json.
        licences: of the student's parts.
        listed: where a fusion model's recall was measured, in words; "" for embeddings.
        rows: "teacher" (if there was one), "student" and "untrained", on `split`.
        seen: the features of "teacher" and "student"; none of a fusion model.
        notes: what could not be shown, and why.
    """

    run: Run
    record: dict[str, Any]
    cache: CacheBase
    split: Split
    log: events.Events
    licences: dict[str, str | None]
    listed: str = ""
    rows: dict[str, Evaluation] = field(default_factory=dict)
    seen: dict[str, Features] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One sentence."""
        student, teacher = self.rows["student"], self.rows.get("teacher")
        where = f"on the {len(self.split.images):,} images of the split {self.split.name!r}"
        where = f"among the listed candidates {where}" if self.listed else where
        if teacher is None:
            lacking = "teacher's row" if self.cache.teacher["name"] else "teacher"
            return (
                f"The student has {student.parameters:,} parameters and an RSUM of "
                f"{student.recall.rsum:.2f} {where}; there is no {lacking} to compare it with."
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
    """Read a run and measure its student on its validation split.

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
    cache = runs.open_cache(folder, record)
    best = runs.learner(folder / "best")
    split = cache.split(record["settings"]["val_split"])
    found = Gathered(opened, record, cache, split, events.read(folder), _licences(best))
    if isinstance(best, Matcher):
        _match(found, best)
    else:
        _embed(found, best)
    _warn(found)
    if latency and isinstance(best, Student):
        _latency(found, best)
    return found


def _licences(best: runs.Learner) -> dict[str, str | None]:
    if isinstance(best, Matcher):
        return {"student": best.licence}
    return {f"student's {side} tower": licence for side, licence in best.licences.items()}


def _embed(found: Gathered, best: Student) -> None:
    """Rows and features of dual encoders, in the whole split."""
    _teacher(found)
    frozen = found.record["settings"]["freeze"]
    seen, row = _measure(best, found.cache, found.split, frozen)
    found.seen["student"] = seen
    found.rows["student"] = row.renamed(f"student ({best.name})")
    before = _measure(found.run.untrained, found.cache, found.split, frozen)[1]
    found.rows["untrained"] = before.renamed("student, untrained")


def _match(found: Gathered, best: Matcher) -> None:
    """Rows of fusion models, among the candidates that the score cache lists."""
    assert isinstance(found.cache, ScoreCache)
    folder = found.run.folder
    listed = matched.Listed(found.cache, found.split)
    told = listed.teacher_recall()
    if told is not None:
        _teacher_row(found, told)
    name = f"student ({folder.resolve().name})"
    found.rows["student"] = _measure_pairs(found, best).renamed(name)
    before = _measure_pairs(found, runs.learner(folder / "student"))
    found.rows["untrained"] = before.renamed("student, untrained")
    found.listed = listed.said
    parts = {part: f"{count:,}" for part, count in best.parameters_by_part().items()}
    found.notes += [
        listed.said,
        f"Of the student's {parts['total']} parameters {parts['towers']} are in its towers and "
        f"{parts['fusion']} in its fusion part.",
        *([f"No teacher's row: {_left(found.cache)}."] if told is None else []),
        "No feature space, finds or milliseconds: a fusion model reads pairs and has no "
        "embeddings. Recall in the whole split, and seconds: "
        f"crosstill evaluate {folder} DATA --split {found.split.name} --efficiency",
    ]


def _measure_pairs(found: Gathered, model: runs.Learner) -> Evaluation:
    """A fusion model's recall among the listed candidates."""
    assert isinstance(model, Matcher) and isinstance(found.cache, ScoreCache)
    seen = matched.of_run(model, found.cache, found.split, parse(found.record["settings"]))
    return Evaluation(model.name, seen.recall(model), model.parameter_count())


def _teacher(found: Gathered) -> None:
    """The teacher's row and features, from the cache."""
    cache, split = found.cache, found.split
    recall = teacher_recall(cache, split)
    if not isinstance(cache, Cache) or recall is None:
        found.notes.append(f"No teacher's row, space or finds: {_left(cache)}.")
        return
    _teacher_row(found, recall)
    found.seen["teacher"] = Features(
        cache.image_features(split.images), cache.text_features(split.captions)
    )


def _teacher_row(found: Gathered, recall: Retrieval) -> None:
    teacher = found.cache.teacher
    name = Path(str(teacher["name"])).name
    found.rows["teacher"] = Evaluation(f"teacher ({name})", recall, teacher["parameters"])


def _left(cache: CacheBase) -> str:
    """What a cache holds that gives its teacher no row."""
    if not isinstance(cache, ScoreCache):
        return f"the cache holds {' and '.join(sorted(cache.modalities)) or 'no'} features"
    if cache.scores is None:
        return "the cache holds candidates that no teacher scored"
    return "the cache holds a fusion teacher's scores of chosen pairs, and no features"


def _measure(
    student: Student, cache: CacheBase, split: Split, frozen: str
) -> tuple[Features, Evaluation]:
    """A student's features of the plain photos of a split, and its recall."""
    encoded = CachedSplit(cache, split, student, frozen)
    seen = encoded.features(student)
    recall = retrieval(*seen, encoded.truth)
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
    model = open_model(source, "encoder")
    if model.identity() != record["identity"]:
        raise MismatchError(f"{source} has changed since it filled the cache")
    return model
