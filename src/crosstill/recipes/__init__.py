"""Published settings: one function each, derived from one base and named as the papers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from crosstill.cache import Cache
from crosstill.errors import unknown
from crosstill.students.student import Student
from crosstill.train import Run, TrainConfig, train


def dsmd() -> TrainConfig:
    """DSMD (arXiv 2404.10838): four losses at several scales, balanced at every step."""
    return TrainConfig(recipe="dsmd")


def info_nce() -> TrainConfig:
    """No teacher: symmetric InfoNCE on the captions alone, everything else as `dsmd`."""
    return TrainConfig(recipe="info_nce", losses={"info_nce": {}}, balance={"name": "fixed"})


RECIPES: dict[str, Callable[[], TrainConfig]] = {"dsmd": dsmd, "info_nce": info_nce}


def config(recipe: str, changes: Sequence[str] = ()) -> TrainConfig:
    """A recipe's settings with `key=value` changes.

    Raises:
        ConfigError: no such recipe, key or value.
    """
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]().changed(changes)


def distill(
    student: Student | None,
    cache: Cache,
    recipe: str | TrainConfig = "dsmd",
    *,
    out: str | Path,
    changes: Sequence[str] = (),
    resume: bool = False,
) -> Run:
    """Train `student` to say what the teacher behind `cache` said.

    Args:
        student: the student; None with `resume`, since a run keeps its own.
        cache: what the teacher said.
        recipe: a recipe's name, or settings made by hand.
        out: the run's folder.
        changes: `key=value` texts, as after `--set`.
        resume: go on with the run in `out`.

    Raises:
        ConfigError, MismatchError, LockedError, NonFiniteError: see `crosstill.train.train`.
    """
    settings = recipe.changed(changes) if isinstance(recipe, TrainConfig) else None
    return train(student, cache, settings or config(str(recipe), changes), out, resume=resume)
