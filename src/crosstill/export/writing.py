"""One export from start to end: find the student, pass the gates of its form, move into place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from crosstill.errors import ConfigError
from crosstill.evaluate import embed
from crosstill.evaluate.report import judge
from crosstill.export import FORMS, Exported, Options, folder, provenance
from crosstill.export.facts import Facts
from crosstill.export.provenance import Provenance
from crosstill.students.student import Student
from crosstill.train import Run


def write(source: str | Path | Run | Student, form: str, out: Path, options: Options) -> Exported:
    """Write an export: see `crosstill.export.run`."""
    if options.int8 and form != "onnx":
        raise ConfigError(f"--int8: {form} has no 8-bit form; use --to onnx")
    folder.check_place(out)
    known = provenance.find(source, options.pairs, options.split if options.pairs else "")
    facts = known.facts(options.command, options.teacher_licence, options.data_licence)
    lines = FORMS.find(form)(known, out, facts, options)
    return Exported(out, (*known.notes, *lines))


def with_recall(known: Provenance, facts: Facts) -> Facts:
    """Add the student's recall to the facts, where there is something to measure it on."""
    if known.pairs is None:
        return facts
    features = embed(known.student, known.pairs)
    recall = judge(known.student, features).recall
    return replace(facts, scores=known.scores(recall, len(features.image), len(features.text)))
