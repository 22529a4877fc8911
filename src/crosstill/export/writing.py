"""One export from start to end: find the student, write aside, pass the gates, move into place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from crosstill.errors import ConfigError
from crosstill.evaluate import embed
from crosstill.evaluate.report import judge
from crosstill.export import Exported, Options, bundling, dual_encoder, folder, provenance, sentence
from crosstill.export.card import card
from crosstill.export.facts import Facts
from crosstill.export.provenance import Provenance
from crosstill.students.student import Student
from crosstill.train import Run


def write(source: str | Path | Run | Student, form: str, out: Path, options: Options) -> Exported:
    """See `crosstill.export.run`."""
    if options.int8 and form != bundling.FORM:
        raise ConfigError(f"--int8: {form} has no 8-bit form; use --to onnx")
    folder.check_place(out)
    known = provenance.find(source, options.pairs, options.split if options.pairs else "")
    facts = known.facts(options.command, options.teacher_licence, options.data_licence)
    if form == bundling.FORM:
        with folder.aside(out, 4 * known.student.parameter_count()) as new:
            lines = bundling.write(known, new, facts, options.int8, options.max_loss)
    else:
        (dual_encoder if form == dual_encoder.FORM else sentence).require(known.student)
        told = _measured(known, facts)
        if form == dual_encoder.FORM:
            found = dual_encoder.write(known.student, out, card(told, "transformers"))
        else:
            found = sentence.write(known.student, out, card(told, "sentence-transformers"))
        lines = [str(found)]
    return Exported(out, (*known.notes, *lines))


def _measured(known: Provenance, facts: Facts) -> Facts:
    """The facts with the student's recall, where there is something to measure it on."""
    if known.pairs is None:
        return facts
    seen = embed(known.student, known.pairs)
    recall = judge(known.student, seen).recall
    return replace(facts, scores=known.scores(recall, len(seen.image), len(seen.text)))
