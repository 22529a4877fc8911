"""A student as a bundle: two ONNX graphs and all that `crosstill.search` needs beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from crosstill import bundle as bundles
from crosstill import files
from crosstill.errors import ConfigError
from crosstill.export import Options, graphs, quality
from crosstill.export.card import card
from crosstill.export.facts import Facts, Rounding
from crosstill.export.folder import aside
from crosstill.export.provenance import Provenance
from crosstill.export.quality import Measured
from crosstill.students.student import Student
from crosstill.teachers.bundle import BundleModel

FORM = "onnx"


def export(known: Provenance, out: Path, facts: Facts, options: Options) -> list[str]:
    """Write a student to `out` as a bundle that has passed its gates: see `write`."""
    with aside(out, 4 * known.student.parameter_count()) as new:
        return write(known, new, facts, options.int8, options.max_loss)


def write(known: Provenance, folder: Path, facts: Facts, int8: bool, max_loss: float) -> list[str]:
    """Fill an empty folder with a bundle that has passed its gates.

    Args:
        known: the student and what measures it.
        folder: to write to.
        facts: for the card; what is measured here is added.
        int8: 8-bit matrix products and embeddings; convolutions stay in fp32.
        max_loss: the share of the RSUM that 8 bits may cost.

    Returns:
        A line for each gate, with its figures.

    Raises:
        ConfigError: 8 bits without photos to measure them on.
        ExportError: a gate was not passed; its figures are in the message.
    """
    if int8 and known.pairs is None:
        why = "; ".join(known.notes) or "no validation photos are known"
        raise ConfigError(f"--int8: is judged by its recall, but {why}; give --data and --images")
    student = known.student
    graphs.write(student, folder)
    student.tokenizer.backend_tokenizer.save(str(folder / bundles.TOKENIZER))
    _record(student, folder, facts, "fp32")
    model = BundleModel(folder, student.name)
    lines = [f"fp32: {quality.hold(quality.compare(student, model, known.pairs), 'fp32')}"]
    if int8:
        graphs.quantise(folder)
        _record(student, folder, facts, "int8")
        model = BundleModel(folder, student.name)
        lines.append(f"int8: {quality.compare(student, model, known.pairs)}")
    facts = replace(facts, fingerprint=model.bundle.fingerprint)
    if known.pairs is not None:
        measured = quality.measure(student, model, known.pairs)
        lines.append(_judged(measured, int8, max_loss))
        facts = _measured(facts, known, measured, int8)
        quality.calibrate(measured.seen, folder / bundles.CALIBRATION)
    (folder / bundles.CARD).write_text(card(facts, FORM), encoding="utf-8")
    _record(student, folder, facts, "int8" if int8 else "fp32")
    return lines


def _judged(measured: Measured, int8: bool, max_loss: float) -> str:
    before, after = measured.before.recall.rsum, measured.after.recall.rsum
    if int8:
        quality.keep(measured, max_loss)
    return f"RSUM {before:.2f} in torch, {after:.2f} exported ({-measured.loss:+.2%})"


def _measured(facts: Facts, known: Provenance, measured: Measured, int8: bool) -> Facts:
    before, after = measured.before.recall.rsum, measured.after.recall.rsum
    scores = known.scores(measured.after.recall, len(measured.seen.image), len(measured.seen.text))
    rounding = Rounding(known.split, before, after) if int8 else None
    return replace(facts, scores=scores, rounding=rounding)


def _record(student: Student, folder: Path, facts: Facts, precision: str) -> None:
    """Write `bundle.json`, which comes last: a folder with one is whole."""
    identity = student.identity()
    identity = {key: identity[key] for key in ("weights", "preprocess", "tokenizer", "activation")}
    apart = {bundles.RECORD, bundles.CARD}
    held = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in apart)
    record: dict[str, Any] = {
        "format": bundles.FORMAT,
        "name": student.name,
        "dim": student.dim,
        "precision": precision,
        "preprocess": student.preprocess.to_json(),
        "max_length": student.config.max_length,
        "padding": student.tokenizer.pad_token_id or 0,
        "identity": {**identity, "precision": precision},
        "parameters": student.parameters_by_part(),
        "licence": student.licence,
        "licences": {
            "teacher": facts.teacher.licence if facts.teacher else None,
            "data": facts.data.licence,
            **{f"{side} tower": tower.licence for side, tower in facts.towers.items()},
        },
        "files": {name: files.digest_file(folder / name) for name in held},
    }
    files.write_json(folder / bundles.RECORD, files.sealed(record))
