"""Losses that compare each side with itself, and so can do with a teacher that left only one."""

from __future__ import annotations

from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.types import Features

SIDES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


class OneSided(Objective):
    """Base of `feature`, `similarity` and `instance`.

    Args:
        side: "both", or "image" or "text" alone, for a teacher that left only that.
    """

    def __init__(self, *, side: str = "both") -> None:
        super().__init__()
        if side not in SIDES:
            raise ConfigError(f"side must be one of {', '.join(SIDES)}, not {side!r}")
        self.sides = SIDES[side]
        self.needs = frozenset(self.sides)

    def pairs(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's (B, D) of the chosen sides; the teacher's without gradient."""
        return [(getattr(student, name), getattr(teacher, name).detach()) for name in self.sides]
