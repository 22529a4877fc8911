"""Which side of the pairs a loss looks at, for teachers that left only one."""

from __future__ import annotations

from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.types import Features

SIDES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


def check(side: str) -> frozenset[str]:
    """The teacher features that a side needs.

    Raises:
        ConfigError: there is no such side.
    """
    if side not in SIDES:
        raise ConfigError(f"side must be one of {', '.join(SIDES)}, not {side!r}")
    return frozenset(SIDES[side])


def chosen(side: str, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
    """Student's and teacher's (B, D) of the chosen sides; the teacher's without gradient."""
    return [(getattr(student, name), getattr(teacher, name).detach()) for name in SIDES[side]]
