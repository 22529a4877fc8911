"""Small dual encoders: what they are made of, how they are built, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosstill.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from crosstill.students.student import Student
    from crosstill.students.student_config import FusionConfig, StudentConfig

__all__ = ["build", "fuse", "load", "load_config", "shorten"]

ALONE = 256  # embedding width where neither a teacher nor the configuration says one


def load_config(preset_or_toml: str | Path) -> StudentConfig | FusionConfig:
    """Read a student's configuration: see `crosstill.students.student_config.load_config`."""
    from crosstill.students import student_config

    return student_config.load_config(preset_or_toml)


def build(
    student: StudentConfig | str | Path,
    dim: int | None = None,
    captions: Sequence[str] = (),
    seed: int = 0,
) -> Student:
    """Build an untrained student.

    Args:
        student: a configuration, a preset's name, or a TOML file.
        dim: D, the width of the teacher's embeddings; None takes the configuration's, or 256
            for a student without a teacher.
        captions: the training captions, for vocabularies that are trimmed to or learnt from them.
        seed: of all that starts at random; equal seeds give equal weights.

    Raises:
        ConfigError: a configuration that cannot be, or that needs captions and got none.
        MismatchError: the configuration asks for another width than `dim`.
        ModelError: a source that does not load.
    """
    # transformers takes seconds to import, and `crosstill --help` should not wait for it.
    from crosstill.students import assembly

    config = load_config(student) if isinstance(student, str | Path) else student
    if config.kind == "matcher":
        raise ConfigError(f"student {config.name}: a fusion model, which learns from a score cache")
    width = dim or config.dim or ALONE
    if width != (config.dim or width):
        raise MismatchError(
            f"student {config.name}: embedding width {config.dim} does not fit the teacher's "
            f"{dim}; leave dim out of the student, or choose another teacher"
        )
    if config.widths and config.widths[-1] > width:
        raise ConfigError(
            f"student {config.name}: widths up to {config.widths[-1]} do not fit embeddings "
            f"of {width}; give smaller ones"
        )
    return assembly.assemble(config.model_copy(update={"dim": width}), captions, seed)


def fuse(
    student: FusionConfig | str | Path,
    captions: Sequence[str] = (),
    seed: int = 0,
    teacher: str | None = None,
) -> Any:
    """Build a fusion model to train: see `crosstill.fusion.build`."""
    # such models are an annex, found by name only
    return import_module("crosstill.fusion.students").build(student, captions, seed, teacher)


def load(folder: str | Path) -> Student:
    """Load a student that was saved: see `crosstill.students.student.Student.load`."""
    from crosstill.students.student import Student

    return Student.load(Path(folder))


def shorten(student: Student, width: int) -> Student:
    """Cut a student's embeddings: see `crosstill.students.matryoshka.shorten`."""
    from crosstill.students import matryoshka

    return matryoshka.shorten(student, width)
