"""A trained student as files that other people's software opens, each past a gate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosstill import plugins
from crosstill.errors import ConfigError

if TYPE_CHECKING:
    from crosstill.data import Pairs
    from crosstill.students.student import Student
    from crosstill.train import Run

__all__ = ["FORMS", "Exported", "onnx", "run", "sentence_transformers", "transformers"]

# Functions of (provenance, out, facts, options): they write an export that has passed its gates
_FORMS = {
    "onnx": "crosstill.export.bundling:export",
    "sentence-transformers": "crosstill.export.sentence:export",
    "transformers": "crosstill.export.dual_encoder:export",
}
FORMS = plugins.Kind(__name__, "form of export", _FORMS)
MAX_LOSS = 0.01  # of the RSUM, that 8 bits may cost


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        folder: where it is.
        lines: what its gates measured, and what could not be.
    """

    folder: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        int8: of "onnx": 8-bit matrix products and embeddings.
        max_loss: the share of the validation RSUM that 8 bits may cost.
        pairs, split: photos and captions to measure on, and their name; None takes those of the
            student's run.
        teacher_licence, data_licence: for the card, where their own cards do not say.
        command: for the card.
    """

    int8: bool = False
    max_loss: float = MAX_LOSS
    pairs: Pairs | None = None
    split: str = "val"
    teacher_licence: str | None = None
    data_licence: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss <= 1:
            raise ConfigError(f"--max-loss {self.max_loss}: a share of the RSUM, from 0 to 1")


def onnx(source: str | Path | Run | Student, out: str | Path, **options: Any) -> Exported:
    """Export a bundle for `crosstill.search`: see `run` and `Options`."""
    return run(source, "onnx", out, **options)


def transformers(source: str | Path | Run | Student, out: str | Path, **options: Any) -> Exported:
    """Export a `VisionTextDualEncoderModel` folder: see `run` and `Options`."""
    return run(source, "transformers", out, **options)


def sentence_transformers(
    source: str | Path | Run | Student, out: str | Path, **options: Any
) -> Exported:
    """Export a folder for `SentenceTransformer(folder)`: see `run` and `Options`."""
    return run(source, "sentence-transformers", out, **options)


def run(source: str | Path | Run | Student, form: str, out: str | Path, **options: Any) -> Exported:
    """Export a student; the folder is there once every gate is passed, and not before.

    Args:
        source: a run, its folder, a student's folder or a student.
        form: one of `FORMS.names()`.
        out: a folder that is empty, absent, or holds an earlier export, which is replaced.
        options: fields of `Options`.

    Raises:
        ConfigError: an option that cannot be, or `out` holds something else.
        ModelError: there is no student, or its parts do not fit the form; they are named.
        ExportError: a gate was not passed; its figures are in the message.
    """
    FORMS.check(form)
    # torch and transformers take seconds to import
    from crosstill.export import writing

    return writing.write(source, form, Path(out), Options(**options))
