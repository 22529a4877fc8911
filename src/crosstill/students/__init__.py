"""Small dual encoders: what they are made of, how they are built, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crosstill.errors import MismatchError

if TYPE_CHECKING:
    from crosstill.students.config import StudentConfig
    from crosstill.students.student import Student

__all__ = ["build", "load", "load_config"]

ALONE = 256  # embedding width where neither a teacher nor the configuration says one


def load_config(preset_or_toml: str | Path) -> StudentConfig:
    """Read a student's configuration: see `crosstill.students.config.load_config`."""
    from crosstill.students import config

    return config.load_config(preset_or_toml)


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
    from crosstill.students import building

    config = load_config(student) if isinstance(student, str | Path) else student
    width = dim or config.dim or ALONE
    if width != (config.dim or width):
        raise MismatchError(
            f"student {config.name}: embedding width {config.dim} does not fit the teacher's "
            f"{dim}; leave dim out of the student, or choose another teacher"
        )
    return building.build(config.model_copy(update={"dim": width}), captions, seed)


def load(folder: str | Path) -> Student:
    """Load a student that was saved: see `crosstill.students.student.Student.load`."""
    from crosstill.students.student import Student

    return Student.load(Path(folder))
