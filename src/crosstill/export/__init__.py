"""A trained student as files that other people's software opens, each past a gate of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from crosstill import extras
from crosstill.errors import ConfigError
from crosstill.export.base import MAX_LOSS, BundleOptions, Exported, FolderOptions, Form, Options
from crosstill.plugins import Kind

if TYPE_CHECKING:
    from crosstill.students.student import Student
    from crosstill.train import Run

__all__ = [
    "FORMS",
    "MAX_LOSS",
    "Exported",
    "Form",
    "Options",
    "onnx",
    "run",
    "sentence_transformers",
    "transformers",
]

FORMS = Kind(
    __name__,
    "form of export",
    {
        "onnx": "crosstill.export.onnx_bundle:OnnxBundle",
        "sentence-transformers": "crosstill.export.library_folders:SentenceTransformersFolder",
        "transformers": "crosstill.export.library_folders:TransformersFolder",
    },
)


def onnx(
    source: str | Path | Run | Student, out: str | Path, **options: Unpack[BundleOptions]
) -> Exported:
    """Export a bundle for `crosstill.search`: see `run`; the options are those of `Options`."""
    return run(source, "onnx", out, **options)


def transformers(
    source: str | Path | Run | Student, out: str | Path, **options: Unpack[FolderOptions]
) -> Exported:
    """Export a `VisionTextDualEncoderModel` folder: see `run`."""
    return run(source, "transformers", out, **options)


def sentence_transformers(
    source: str | Path | Run | Student, out: str | Path, **options: Unpack[FolderOptions]
) -> Exported:
    """Export a folder for `SentenceTransformer(folder)`: see `run`."""
    return run(source, "sentence-transformers", out, **options)


def run(
    source: str | Path | Run | Student,
    form: str,
    out: str | Path,
    **options: Unpack[BundleOptions],
) -> Exported:
    """Export a student; the folder is there once every gate is passed, and not before.

    Args:
        source: a run, its folder, a student's folder or a student.
        form: the name of one of `FORMS`.
        out: a folder that is empty, absent, or holds an earlier export, which is replaced.
        options: fields of `Options`.

    Raises:
        ConfigError: an option that cannot be, or `out` holds something else.
        ModelError: there is no student, or its parts do not fit the form; they are named.
        ExportError: a gate was not passed; its figures are in the message.
    """
    FORMS.check(form)
    place, chosen = Path(out), Options(**options)
    # torch and transformers take seconds to import
    from crosstill.export import export_folder, provenance
    from crosstill.export.card import card

    writer = FORMS.find_class(form, Form)()
    if chosen.int8 and not writer.int8:
        raise ConfigError(f"--int8: {form} has no 8-bit form; use --to onnx")
    extras.need(f"a student as {form}", "export", *writer.needs)
    export_folder.check_place(place)
    known = provenance.find(source, chosen.pairs, chosen.split if chosen.pairs else "")
    facts = known.facts(chosen.command, chosen.teacher_licence, chosen.data_licence)
    writer.require(known, chosen)
    with export_folder.aside(place, 4 * known.student.parameter_count()) as new:
        facts, lines = writer.write(known, new, facts, chosen)
        (new / "README.md").write_text(card(facts, writer), encoding="utf-8")
    return Exported(place, (*known.notes, *lines))
