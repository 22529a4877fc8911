"""Results of a run for its report, read and measured: recall, finds, cost; nothing is drawn here.

The finds are the five first photos of each model for ten captions, the right one marked; without
pairs, for ten texts, and no photo is right.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from crosstill import images
from crosstill.cache import CacheBase, Split
from crosstill.errors import CrosstillError, InputError, MismatchError
from crosstill.evaluate import CachedSplit, Evaluation, evaluation
from crosstill.evaluate.agreement import open_split
from crosstill.evaluate.likeness import describe_alike
from crosstill.evaluate.recall import DEPTHS, Retrieval
from crosstill.fusion.matcher import Matcher
from crosstill.models import open as open_model
from crosstill.report import curves
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher
from crosstill.train import Run
from crosstill.train import folder as runs
from crosstill.train.config import parse
from crosstill.train.task import learnt_rows, open_validation
from crosstill.types import Features

QUERIES = 10
TOP = 5
SIDE = 112  # pixels of the longer side


@dataclass
class RunResults:
    """The results of a finished run.

    Attributes:
        record: the run's config.json.
        split: the rows that models are measured on.
        licences: of the student's parts.
        listed: where a fusion model's recall was measured, in words; "" for embeddings.
        rows: "teacher" (if there was one), "student" and "untrained", on `split`.
        features: of "teacher" and "student"; none of a fusion model.
        space: the same, but the teacher's as the student learns them, such as centred ones.
        cosines: mean cosines of "teacher" and "student", by side.
        notes: what could not be shown, and why.
    """

    run: Run
    record: dict[str, Any]
    cache: CacheBase
    split: Split
    log: curves.Events
    licences: dict[str, str | None] = field(default_factory=dict)
    listed: str = ""
    rows: dict[str, Evaluation] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    space: dict[str, Features] = field(default_factory=dict)
    cosines: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The run in one sentence."""
        student, teacher = self.rows["student"], self.rows.get("teacher")
        where = f"on the {len(self.split.images):,} images of the split {self.split.name!r}"
        if not self.split.pairs:
            return (
                f"The student has {student.parameters:,} parameters, and of the teacher's ten best "
                f"{student.recall.value:.1f} % are among its own ten {where}."
            )
        where = f"among the listed candidates {where}" if self.listed else where
        if teacher is None:
            lacking = "teacher's row" if self.cache.teacher["name"] else "teacher"
            return (
                f"The student has {student.parameters:,} parameters and an RSUM of "
                f"{student.recall.value:.2f} {where}; there is no {lacking} to compare it with."
            )
        share = student.recall.value / teacher.recall.value if teacher.recall.value else 0.0
        figures = f"{where}: {student.recall.value:.2f} against {teacher.recall.value:.2f}"
        if not teacher.parameters:
            return f"The student has {share:.0%} of the teacher's RSUM {figures}."
        size = (student.parameters or 0) / teacher.parameters
        return (
            f"The student has {size:.0%} of the teacher's parameters and {share:.0%} of its RSUM "
            f"{figures}."
        )


def read(folder: Path, latency: bool) -> RunResults:
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
    split = split.paired() if split.pairs else split
    results = RunResults(opened, record, cache, split, curves.read(folder))
    if best.kind == "matcher":
        _match(results, best)
    else:
        _embed(results, best)
    _warn(results)
    if latency and best.kind == "encoder":
        _latency(results, best)
    return results


def _embed(results: RunResults, best: Student) -> None:
    """Add rows and features of dual encoders, in the whole split."""
    config = parse(results.record["settings"])
    cache, split = learnt_rows(results.cache, config), results.split
    held_out = open_split(cache, split, best, config.freeze)
    _teacher(results, held_out)
    results.features["student"], row = _measure(best, held_out)
    results.rows["student"] = row.renamed(f"student ({best.name})")
    learnt = cache.split_features(held_out.split)
    results.space = results.features | ({} if learnt is None else {"teacher": learnt})
    results.cosines = {
        "teacher": held_out.teacher_cosines(),
        "student": held_out.cosines(results.features["student"]),
    }
    if alike := describe_alike(results.cosines["student"], results.cosines["teacher"]):
        results.notes.append(
            f"The best student's rows are alike: {alike}. The run's log said what to set; see "
            "docs/training.md."
        )
    untrained = results.run.untrained
    before = _measure(untrained, open_split(cache, split, untrained, config.freeze))[1]
    results.rows["untrained"] = before.renamed("student, untrained")
    results.licences = {f"student's {side} tower": of for side, of in best.licences.items()}
    results.split = replace(held_out.split, name=split.name)  # of thousands without pairs, some


def _match(results: RunResults, best: Matcher) -> None:
    """Add rows of fusion models, among the candidates that the score cache lists."""
    cache, split, folder = results.cache, results.split, results.run.folder
    config = parse(results.record["settings"])
    validation = open_validation(cache, split, best, config)
    recall = validation.teacher_recall()
    if recall is not None:
        _teacher_row(results, recall)
    results.rows["student"] = Evaluation(
        f"student ({folder.resolve().name})", validation.recall(best), best.parameter_count()
    )
    untrained = runs.learner(folder / "student")
    before = open_validation(cache, split, untrained, config).recall(untrained)
    results.rows["untrained"] = Evaluation(
        "student, untrained", before, untrained.parameter_count()
    )
    results.licences, results.listed = {"student": best.licence}, validation.caveat
    parts = {part: f"{count:,}" for part, count in best.parameters_by_part().items()}
    results.notes += [
        validation.caveat,
        f"Of the student's {parts['total']} parameters {parts['towers']} are in its towers and "
        f"{parts['fusion']} in its fusion part.",
        *([f"No teacher's row: {_contents(cache)}."] if recall is None else []),
        "No feature space, finds or milliseconds: a fusion model reads pairs and has no "
        "embeddings. Recall in the whole split, and seconds: "
        f"crosstill evaluate {folder} DATA --split {split.name} --efficiency",
    ]


def _teacher(results: RunResults, held_out: CachedSplit) -> None:
    """Add the teacher's row and features, from the cache."""
    cache, recall = results.cache, held_out.teacher_recall()
    features = cache.split_features(held_out.split)
    if not results.split.pairs:
        if features is not None:
            results.features["teacher"] = features
        return
    if recall is None or features is None:
        results.notes.append(f"No teacher's row, space or finds: {_contents(cache)}.")
        return
    _teacher_row(results, recall)
    results.features["teacher"] = features


def _teacher_row(results: RunResults, recall: Retrieval) -> None:
    teacher = results.cache.teacher
    name = Path(str(teacher["name"])).name
    results.rows["teacher"] = Evaluation(f"teacher ({name})", recall, teacher["parameters"])


def _contents(cache: CacheBase) -> str:
    """Describe a cache whose contents give its teacher no row."""
    if not cache.listed:
        return f"the cache holds {' and '.join(sorted(cache.modalities)) or 'no'} features"
    if not cache.scored:
        return "the cache holds candidates that no teacher scored"
    return "the cache holds a fusion teacher's scores of chosen pairs, and no features"


def _measure(student: Student, held_out: CachedSplit) -> tuple[Features, Evaluation]:
    """Measure a student's features of the plain photos of a split, and how they rank."""
    features = held_out.features(student)
    ranking = held_out.rank(features)
    return features, Evaluation(student.name, ranking, student.parameter_count())


def _warn(results: RunResults) -> None:
    images = len(results.split.images)
    if images <= DEPTHS[-1]:
        results.notes.append(f"Only {images} images: recall at {DEPTHS[-1]} is 100 for any model.")
    for row in results.rows.values():
        if row.recall.warning:
            results.notes.append(f"{row.name}: {row.recall.warning}.")


def _latency(results: RunResults, student: Student) -> None:
    """Add milliseconds of the student and, where it can still be opened, of its teacher."""
    models: dict[str, Teacher] = {"student": student}
    try:
        if "teacher" in results.rows:
            models["teacher"] = _open_teacher(results.cache.teacher)
    except CrosstillError as error:
        results.notes.append(f"The teacher's latency was not measured: {error}.")
    for role, latency in evaluation.measure_latency(models).items():
        results.rows[role] = replace(results.rows[role], efficiency=latency)


def _open_teacher(record: dict[str, Any]) -> Teacher:
    """Open the very model that filled the cache; a report downloads nothing."""
    source = record["source"]
    if source is None or not Path(source).is_dir():
        raise InputError(f"{source or record['name']} is not on this machine")
    model = open_model(source, "encoder")
    if model.identity() != record["identity"]:
        raise MismatchError(f"{source} has changed since it filled the cache")
    return model


@dataclass(frozen=True)
class FoundPhoto:
    """One photo in one model's answer."""

    photo: str  # data URI
    alt: str
    right: bool


@dataclass(frozen=True)
class Answer:
    """The first photos that one model finds.

    Attributes:
        model: "teacher" or "student".
        photos: the best first.
        rank: the place of the right photo; None for a text without photo.
        shared: how many of `photos` are among the teacher's first ones; None of the teacher,
            without one, and where there is a right photo.
    """

    model: str
    photos: tuple[FoundPhoto, ...]
    rank: int | None
    shared: int | None


@dataclass(frozen=True)
class Query:
    """A caption and the models' answers to it."""

    caption: str
    answers: tuple[Answer, ...]


def queries(
    cache: CacheBase, split: Split, features: Mapping[str, Features], count: int = QUERIES
) -> list[Query]:
    """Search with captions, or loose texts, spread evenly over the split, always the same ones.

    Raises:
        DataError: a photo is no longer where the cache found it.
        MismatchError: a photo has changed since.
    """
    chosen = np.unique(np.linspace(0, len(split.captions) - 1, count).round().astype(int))
    thumbnails = _Thumbnails(cache, split)
    return [_query(int(row), split, features, thumbnails) for row in chosen]


def _query(
    row: int, split: Split, features: Mapping[str, Features], thumbnails: _Thumbnails
) -> Query:
    right = int(split.owner[row])
    paired, answers = right >= 0, []
    orders = {
        model: (rows.image @ rows.text[row]).argsort(descending=True, stable=True)
        for model, rows in features.items()
    }
    for model, order in orders.items():
        rank = int((order == right).nonzero()) + 1 if paired else None
        first = order[:TOP].tolist()
        shared = None
        if not paired and model != "teacher" and "teacher" in orders:
            shared = len({*first} & {*orders["teacher"][:TOP].tolist()})
        photos = tuple(thumbnails.photo(place, place == right) for place in first)
        answers.append(Answer(model, photos, rank, shared))
    return Query(thumbnails.cache.texts[int(split.captions[row])], tuple(answers))


class _Thumbnails:
    """Small JPEGs of a split's photos, each decoded once."""

    def __init__(self, cache: CacheBase, split: Split) -> None:
        self.cache, self.split = cache, split
        self._made: dict[int, str] = {}
        owners, first = np.unique(split.owner[: split.pairs], return_index=True)
        self._caption = dict(zip(owners.tolist(), split.captions[first].tolist(), strict=True))

    def photo(self, place: int, right: bool) -> FoundPhoto:
        """Return the photo at a position of the split, described by its first caption or name."""
        row = int(self.split.images[place])
        if place not in self._made:
            self._made[place] = _thumbnail(self.cache, row)
        captioned = place in self._caption
        alt = (
            self.cache.texts[self._caption[place]]
            if captioned
            else Path(self.cache.paths[row]).name
        )
        return FoundPhoto(self._made[place], alt, right)


def _thumbnail(cache: CacheBase, row: int) -> str:
    pixels = images.decode(cache.photo(row), cache.paths[row])
    picture = Image.fromarray(torch.Tensor.numpy(pixels))
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
