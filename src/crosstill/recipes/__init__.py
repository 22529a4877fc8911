"""Published settings: one function each, derived from one base and named as the papers do.

Every recipe differs from `dsmd` only in its losses and their weighting. A method that was
published as an addition to a task's own loss keeps that loss here: `info_nce` on the captions.
`flickr30k` and `coco` are DSMD's whole setting on these datasets, see docs/reproduce.md.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstill.cache import CacheBase
from crosstill.errors import ConfigError, unknown
from crosstill.train import Learner, Run, TrainConfig, train
from crosstill.train import folder as runs

Losses = Mapping[str, Mapping[str, Any]]


def dsmd() -> TrainConfig:
    """DSMD (arXiv 2404.10838): four losses at several scales, balanced at every step."""
    return TrainConfig(recipe="dsmd")


def flickr30k() -> TrainConfig:
    """DSMD on Flickr30k as published, every number spelt out, for the student `paper`.

    The queue keeps the row's own image among its negatives, which `dsmd` mends.
    """
    return _published("flickr30k")


def coco() -> TrainConfig:
    """DSMD on COCO, for which the paper gives no other settings than for Flickr30k."""
    return _published("coco")


def dsmd_released() -> TrainConfig:
    """DSMD as its authors' code runs it, not as the paper describes it.

    The balancer takes its ratios after scaling, which makes them all equal; every violating
    negative is summed; the queue keeps the row's own image.
    """
    losses: Losses = {
        "contrastive": {"mask_same_image": False},
        "feature": {},
        "similarity": {},
        "hard_negative": {"negatives": "all"},
    }
    return _derived("dsmd_released", losses, {"name": "dsmd_scaled"})


def kd() -> TrainConfig:
    """Knowledge distillation (arXiv 1503.02531): softened similarity rows and the task."""
    return _with_task("kd", {"kd": {}})


def clip_kd() -> TrainConfig:
    """CLIP-KD (arXiv 2307.12732): FD, ICL, CRD and the task, with its published weights."""
    return _derived("clip_kd", {"clip_kd": {}})


def fsp() -> TrainConfig:
    """Flow of the solution procedure (Yim et al., CVPR 2017): cross-modal Gram and the task."""
    return _with_task("fsp", {"fsp": {}})


def dcd() -> TrainConfig:
    """DCD (arXiv 2207.01426): its own two terms over the candidates the teacher finds hardest."""
    return _derived("dcd", {"dcd": {}})


def rkd() -> TrainConfig:
    """Relational distillation (arXiv 1904.05068): distances, angles and the task."""
    return _with_task("rkd", {"rkd": {}})


def dkd() -> TrainConfig:
    """Decoupled distillation (arXiv 2203.08679): target and other rows apart, and the task."""
    return _with_task("dkd", {"dkd": {}})


def crd() -> TrainConfig:
    """Contrastive representation distillation (arXiv 1910.10699) and the task, 0.8 to 1."""
    return _with_task("crd", {"crd": {}}, {"crd": 0.8})


def cprd() -> TrainConfig:
    """CPRD (arXiv 2407.07479): the teacher's ranking of hard negatives, and its task term."""
    return _derived("cprd", {"cprd": {}})


def info_nce() -> TrainConfig:
    """No teacher: symmetric InfoNCE on the captions alone, everything else as `dsmd`."""
    return _derived("info_nce", {"info_nce": {}})


def _published(name: str) -> TrainConfig:
    """Section 4 of arXiv 2404.10838, so that no default of ours can move it."""
    return TrainConfig(
        recipe=name,
        losses={
            "contrastive": {"temperature": 0.05, "queue_size": 8192, "mask_same_image": False},
            "feature": {},
            "similarity": {},
            "hard_negative": {"margin": 0.0, "negatives": "hardest"},
        },
        balance={"name": "dsmd", "temperature": 1.0},
        epochs=20,
        batch_size=64,
        lr=1e-4,
        weight_decay=1e-4,
        schedule="step",
        milestones=(10,),
        gamma=0.1,
    )


def _derived(name: str, losses: Losses, balance: Mapping[str, Any] | None = None) -> TrainConfig:
    """`dsmd` with other losses and another weighting."""
    values = {"recipe": name, "losses": losses, "balance": balance or {"name": "fixed"}}
    return TrainConfig.model_validate({**dsmd().model_dump(), **values})


def _with_task(
    name: str, losses: Losses, weights: Mapping[str, float] | None = None
) -> TrainConfig:
    """A method's losses and InfoNCE on the captions, added up."""
    balance = {"name": "fixed", **({"weights": weights} if weights else {})}
    return _derived(name, {**losses, "info_nce": {}}, balance)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        dsmd,
        flickr30k,
        coco,
        dsmd_released,
        kd,
        clip_kd,
        fsp,
        dcd,
        rkd,
        dkd,
        crd,
        cprd,
        info_nce,
    )
}


def config(recipe: str, changes: Sequence[str] = ()) -> TrainConfig:
    """A recipe's settings with `key=value` changes.

    Raises:
        ConfigError: no such recipe, key or value.
    """
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]().changed(changes)


def resumed(folder: Path) -> TrainConfig:
    """The settings of a run that is to be resumed, its losses in the order of its start.

    Older runs did not keep that order. Theirs is worked out from the command that started them,
    or, of a run that was started from Python, from its recipe.

    Raises:
        ConfigError: an older run whose losses could have had several orders.
    """
    record = runs.read_record(folder)
    settings = runs.settings_of(record)
    if record["losses"] or len(settings.losses) == 1:
        return settings
    typed = _typed(record["command"])
    if typed is not None and typed.losses == settings.losses:
        return runs.settings_of(record, list(typed.losses))
    known = RECIPES[settings.recipe]().losses if settings.recipe in RECIPES else {}
    order = [name for name in known if name in settings.losses]
    added = [name for name in settings.losses if name not in known]
    if len(added) > 1:
        raise ConfigError(
            f"{folder}: an older crosstill started this run and did not keep the order of "
            f"{', '.join(settings.losses)}, by which its state is kept; resume it from Python, "
            "with the settings it was started with: crosstill.distill(None, cache, settings, "
            "out=..., resume=True)"
        )
    return runs.settings_of(record, order + added)


def _typed(command: str) -> TrainConfig | None:
    """The settings that a `crosstill train` command asks for; None if it is another command."""
    words = shlex.split(command)
    if words[1:2] != ["train"]:
        return None
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--recipe", default="dsmd")
    options.add_argument("--set", action="append", default=[])
    known, _ = options.parse_known_args(words[2:])
    return config(known.recipe, known.set)


def distill(
    student: Learner | None,
    cache: CacheBase,
    recipe: str | TrainConfig = "dsmd",
    *,
    out: str | Path,
    changes: Sequence[str] = (),
    resume: bool = False,
) -> Run:
    """Train `student` to say what the teacher behind `cache` said.

    Args:
        student: the student, a dual encoder or a fusion model; None with `resume`, since a run
            keeps its own.
        cache: what the teacher said: features, or scores of candidate lists.
        recipe: a recipe's name, or settings made by hand.
        out: the run's folder.
        changes: `key=value` texts, as after `--set`.
        resume: go on with the run in `out`.

    Raises:
        ConfigError, MismatchError, LockedError, NonFiniteError: see `crosstill.train.train`.
    """
    settings = recipe.changed(changes) if isinstance(recipe, TrainConfig) else None
    return train(student, cache, settings or config(str(recipe), changes), out, resume=resume)
