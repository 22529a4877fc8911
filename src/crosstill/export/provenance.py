"""Find what a student came from: its run, its teacher, and the photos that measure its export."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crosstill import files, models, students
from crosstill.cache import CacheBase
from crosstill.data import Pairs
from crosstill.errors import CrosstillError, InputError, ModelError
from crosstill.evaluate.embedding import teacher_recall
from crosstill.evaluate.recall import Ranking, Retrieval
from crosstill.export.card import Facts, Origin, Score
from crosstill.export.held_out import HeldOut, HeldOutPairs, HeldOutRows
from crosstill.students.student import Student
from crosstill.train import Run
from crosstill.train import folder as runs
from crosstill.train.config import parse
from crosstill.train.task import learnt_rows


@dataclass(frozen=True)
class Provenance:
    """A student and what it came from.

    Attributes:
        student: in eval mode, on the CPU.
        name: of the student.
        pairs: photos that it was not trained on, and their captions if they have any; None where
            none are at hand.
        held_out: the same with what is measured on them.
        split: name of these pairs.
        teacher: name, source, licence, parameters, as the run recorded them; {} without one.
        data: name and perhaps licence of the training data; {} where unknown.
        teacher_recall: on `pairs`, where the teacher's features of them were kept.
        notes: what could not be found, and why.
    """

    student: Student
    name: str
    pairs: Pairs | None = None
    held_out: HeldOut | None = None
    split: str = ""
    teacher: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    teacher_recall: Retrieval | None = None
    notes: tuple[str, ...] = ()

    def scores(self, ranking: Ranking) -> tuple[Score, ...]:
        """Return the rows of a card's table: the teacher's, where known, and the student's."""
        rows = {"teacher": self.teacher_recall, "student": ranking}
        return tuple(
            Score(name, self.split, row.images, row.captions, row.figures, row.heads)
            for name, row in rows.items()
            if row is not None
        )

    def measured(self, facts: Facts) -> Facts:
        """Add the student's figures to the facts, where there is something to measure them on."""
        if self.held_out is None:
            return facts
        measured = self.held_out.measure(self.student)
        return replace(facts, scores=self.scores(measured.evaluation.recall))

    def facts(self, command: str, teacher_licence: str | None, data_licence: str | None) -> Facts:
        """Return what a card states before anything is measured; given licences win."""
        student, teacher, data = self.student, self.teacher or {}, self.data or {}
        teacher_origin = (
            Origin(teacher["name"], teacher_licence or teacher["licence"]) if teacher else None
        )
        data_origin = Origin(data.get("name", "not known"), data_licence or data.get("licence"))
        towers = {
            side: Origin(_public(getattr(student.config, side).source) or f"{side} tower", licence)
            for side, licence in student.licences.items()
            if licence or getattr(student.config, side).source
        }
        return Facts(
            name=self.name,
            parameters=student.parameters_by_part(),
            dim=student.dim,
            max_length=student.config.max_length,
            preprocess=student.preprocess,
            data=data_origin,
            teacher=teacher_origin,
            towers=towers,
            command=command,
            version=files.VERSION,
            fingerprint=files.digest_json(student.identity()),
        )


def _public(source: str | None) -> str | None:
    """Return a hub id as it is, of a folder only its name: a card holds nobody's paths."""
    return Path(source).name if source and Path(source).exists() else source


def find(
    source: str | Path | Run | Student, pairs: Pairs | None = None, split: str = ""
) -> Provenance:
    """Find a student and what it came from.

    Args:
        source: a run, its folder, a student's folder or a student.
        pairs: to measure on in place of those of the run.
        split: name of these pairs.

    Raises:
        ModelError: there is no student, or one that reads pairs.
        InputError: the run has not finished.
    """
    if isinstance(source, str | Path | Run):
        place = source.folder if isinstance(source, Run) else source
        folder, _ = models.split_width(place)
        student = _student(folder, place)
        run = next((place for place in (folder, folder.parent) if runs.is_run(place)), None)
    else:
        home = Path(source.source).parent if source.source else None
        student, run = source, home if home and runs.is_run(home) else None
    student = student.to("cpu").eval()
    if student.config.widths:  # turned, so that whoever opens it may cut its rows
        student = students.shorten(student, student.dim)
    held_out = HeldOutPairs(pairs) if pairs is not None else None
    origin = Provenance(student, student.name, pairs, held_out, split)
    return origin if run is None else _of_run(origin, run)


def _student(folder: Path, place: str | Path) -> Student:
    if runs.is_run(folder) and not (folder / "metrics.json").is_file():
        raise InputError(
            f"{folder}: the run is not finished; finish it with `crosstill train … --resume`"
        )
    student = models.open_student(place)
    if student is not None:
        return student
    models.open(place, "live")  # refuses what is no model at all
    raise ModelError(
        f"{folder}: only a student of ours (a dual encoder that crosstill trained) is exported"
    )


def _of_run(origin: Provenance, folder: Path) -> Provenance:
    record = Run(folder).config
    origin = replace(
        origin,
        name=folder.resolve().name,
        teacher={} if record["teacher"].get("name") is None else record["teacher"],
        data=record["data"],
    )
    if origin.pairs is not None:
        return origin
    split = record["settings"]["val_split"]
    try:
        cache: CacheBase = runs.open_cache(folder, record)
        rows = cache.split(split)
        pairs = cache.pairs(split)
        if pairs.examples:
            pairs.read(pairs.examples[0])
        learnt = learnt_rows(cache, parse(record["settings"]))
        held_out: HeldOut = HeldOutPairs(pairs) if rows.pairs else HeldOutRows(learnt, split)
    except CrosstillError as error:
        return replace(origin, notes=(f"no validation photos: {error}",))
    teacher = teacher_recall(cache, rows) if rows.pairs else None
    return replace(origin, pairs=pairs, held_out=held_out, split=split, teacher_recall=teacher)
