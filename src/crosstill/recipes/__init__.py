"""Recipes: `recommended`, and published settings, one function each, named as the papers do.

Every published one differs from `dsmd` only in its losses and their weighting. A method that was
published as an addition to a task's own loss keeps that loss here: `info_nce` on the captions.
`flickr30k` and `coco` are DSMD's whole setting on these datasets, see docs/reproduce.md.
"""

import argparse
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstill import cache as caches
from crosstill import students
from crosstill.cache import CacheBase
from crosstill.errors import ConfigError, unknown
from crosstill.students.student_config import FusionConfig, StudentConfig
from crosstill.train import Learner, Run, TrainConfig, train
from crosstill.train import folder as runs
from crosstill.train.config import parse
from crosstill.train.distributed import leads
from crosstill.train.loop import fitted
from crosstill.train.task import open_task

__all__ = ["RECIPES", "choose", "config", "distill", "resumed"]

log = logging.getLogger(__name__)

Losses = Mapping[str, Mapping[str, Any]]


def recommended() -> TrainConfig:
    """DSMD's four losses with a margin and InfoNCE on the captions, balanced at every step.

    What a cache cannot serve is left out: see `for_cache`. What was tried is in docs/log.md.
    """
    losses = {**dsmd().losses, "info_nce": {"temperature": 0.1}}
    settings = _derived("recommended", losses, {"name": "dsmd"})
    optimizer = {"schedule": "cosine", "warmup_share": 0.05, "lr": 3e-4, "dropout": False}
    return settings.model_copy(update=optimizer)


def dsmd() -> TrainConfig:
    """DSMD (arXiv 2404.10838): four losses at several scales, balanced at every step."""
    return TrainConfig(recipe="dsmd")


def flickr30k() -> TrainConfig:
    """DSMD on Flickr30k as published, every number spelt out, for the student `paper`.

    Queue and hard negatives keep the row's own image among the negatives, which `dsmd` mends, and
    the margin is 0, where short runs collapse.
    """
    return _published("flickr30k")


def coco() -> TrainConfig:
    """DSMD on COCO, for which the paper gives no other settings than for Flickr30k."""
    return _published("coco")


def dsmd_released() -> TrainConfig:
    """DSMD as its authors' training script runs it, not as the paper describes it.

    The balancer takes its ratios after scaling, which makes them all equal; every violating
    negative within the script's margin of 0.05 is summed (its option's default is 0.2); queue and
    hard negatives keep the row's own image; pairs come in the order of the data, 128 at a time,
    for 30 epochs with a step at 20.
    """
    losses: Losses = {
        "contrastive": {"mask_same_image": False},
        "feature": {},
        "similarity": {},
        "hard_negative": {"margin": 0.05, "negatives": "all", "mask_same_image": False},
    }
    released = _derived("dsmd_released", losses, {"name": "dsmd_scaled"})
    changes = {
        "epochs": 30,
        "batch_size": 128,
        "milestones": (20,),
        "shuffle": False,
        "center": False,
        "init_heads": "random",
    }
    return released.model_copy(update=changes)


def kd() -> TrainConfig:
    """Knowledge distillation (arXiv 1503.02531): softened similarity rows and the task."""
    return _with_task("kd", {"kd": {}})


def clip_kd() -> TrainConfig:
    """CLIP-KD (arXiv 2307.12732): FD, ICL, CRD and the task, with its published weights."""
    return _derived("clip_kd", {"clip_kd": {}})


def fsp() -> TrainConfig:
    """Flow of the solution procedure (Yim et al., CVPR 2017): cross-modal Gram and the task.

    At weight 1 its gradient is 0.4 to 2 % of the task's; at 100 it makes all photos alike.
    """
    return _with_task("fsp", {"fsp": {}}, {"fsp": 20.0})


def dcd() -> TrainConfig:
    """DCD (arXiv 2207.01426): its own two terms over the candidates the teacher finds hardest.

    A dual encoder's cosines are calibrated, from a scale of 10 as in SigLIP; a fusion student's
    logits are left as they are.
    """
    return _derived("dcd", {"dcd": {"calibrate": True, "temperature": 0.1}})


def dcd_released() -> TrainConfig:
    """DCD for a fusion student with the losses and the optimizer of its authors' code.

    That is ITM beside the ranking of captions, at 0.5 to 1, in batches of 512 for 10 epochs.
    """
    losses: Losses = {"dcd": {"directions": "image", "reduction": "released", "matching": 0.5}}
    changes = {
        "epochs": 10,
        "batch_size": 512,
        "lr": 5e-6,
        "fusion_lr": 5.0,
        "weight_decay": 0.01,
        "decay": "matrices",
        "betas": (0.9, 0.98),
        "schedule": "linear",
        "warmup_share": 0.1,
    }
    return _derived("dcd_released", losses).model_copy(update=changes)


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
            "hard_negative": {"margin": 0.0, "negatives": "hardest", "mask_same_image": False},
        },
        balance={"name": "dsmd", "temperature": 1.0},
        epochs=20,
        batch_size=64,
        lr=1e-4,
        weight_decay=1e-4,
        schedule="step",
        milestones=(10,),
        gamma=0.1,
        center=False,
        init_heads="random",
    )


def _derived(name: str, losses: Losses, balance: Mapping[str, Any] | None = None) -> TrainConfig:
    """`dsmd` with other losses and another weighting."""
    values = {"recipe": name, "losses": losses, "balance": balance or {"name": "fixed"}}
    return TrainConfig.model_validate({**dsmd().model_dump(), **values})


def _with_task(
    name: str, losses: Losses, weights: Mapping[str, float] | None = None
) -> TrainConfig:
    """Add InfoNCE on the captions to a method's losses."""
    balance = {"name": "fixed", **({"weights": weights} if weights else {})}
    return _derived(name, {**losses, "info_nce": {}}, balance)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        recommended,
        dsmd,
        flickr30k,
        coco,
        dsmd_released,
        kd,
        clip_kd,
        fsp,
        dcd,
        dcd_released,
        rkd,
        dkd,
        crd,
        cprd,
        info_nce,
    )
}


def config(recipe: str, changes: Sequence[str] = ()) -> TrainConfig:
    """Return a recipe's settings with `key=value` changes.

    Raises:
        ConfigError: no such recipe, key or value.
    """
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    return RECIPES[recipe]().changed(changes)


def for_cache(cache: CacheBase, kind: str, split: str = "train") -> TrainConfig:
    """Fit `recommended` to what a cache holds.

    Args:
        cache: what the student learns from.
        kind: of the student, "encoder" or "matcher".
        split: the training split.

    Returns:
        `recommended`; without a teacher InfoNCE alone; of a score cache the losses of `dcd` for a
        fusion model and of `cprd` for a dual encoder; with rows of one side the losses that need
        no other; with KD's similarity rows where most photos or texts are in no pair, and those in
        place of InfoNCE where all are.
    """
    settings, rows = recommended(), cache.split(split)
    losses, pairs = dict(settings.losses), rows.pairs
    there = {"image": len(rows.images), "text": len(rows.captions)}
    has = [side for side in sorted(cache.modalities) if there[side]]
    if cache.listed:
        name = ("dcd" if kind == "matcher" else "cprd") if cache.scored else "info_nce"
        losses = RECIPES[name]().losses
    elif not has:
        losses = {"info_nce": {}}
    elif len(has) == 1:
        side = {"side": has[0]}
        task = {"info_nce": losses["info_nce"]} if pairs else {}
        losses = {"feature": side, "instance": side} | task
    elif 2 * pairs < there["text"] or 2 * len(rows.captioned) < there["image"]:
        losses["kd"] = {}  # across modalities, on rows that are in no pair
        if not pairs:
            del losses["info_nce"]
    if losses == settings.losses:
        return settings
    log.info("recommended, fitted to %s: losses %s", cache.folder, ", ".join(losses))
    return parse({**settings.model_dump(), "losses": losses})


def resumed(folder: Path) -> TrainConfig:
    """Read the settings of a run that is to be resumed, its losses in the order of its start.

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
    """Parse the settings of a `crosstill train` command; None if it is another command."""
    words = shlex.split(command)
    if words[1:2] != ["train"]:
        return None
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--recipe", default="dsmd")  # as it was for the runs in question
    options.add_argument("--set", action="append", default=[])
    known, _ = options.parse_known_args(words[2:])
    return config(known.recipe, known.set)


def choose(
    recipe: str | TrainConfig | None, changes: Sequence[str] = (), resuming: Path | None = None
) -> TrainConfig:
    """Return the settings of a run that is to be started or resumed.

    Args:
        recipe: a recipe's name, or settings made by hand; None is `recommended`, or what the
            resumed run was started with.
        changes: `key=value` texts, as after `--set`.
        resuming: the folder of the run to resume; None starts a new one.

    Raises:
        ConfigError: no such recipe, key or value, or not the recipe of the resumed run.
    """
    if isinstance(recipe, TrainConfig):
        return recipe.changed(changes)
    if recipe is not None and recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    if resuming is None or not runs.is_run(resuming):
        return config(recipe or "recommended", changes)
    settings = resumed(resuming).changed(changes)
    if recipe not in (None, settings.recipe):
        raise ConfigError(
            f"--recipe {recipe}: {resuming} was started with {settings.recipe}, which a resumed "
            "run keeps; leave --recipe out, or start another run"
        )
    return settings


def distill(
    student: Learner | StudentConfig | FusionConfig | str | Path | None,
    cache: CacheBase | str | Path,
    recipe: str | TrainConfig | None = None,
    *,
    out: str | Path,
    changes: Sequence[str] = (),
    resume: bool = False,
    command: str = "",
) -> Run:
    """Train a student to agree with the teacher behind a cache.

    Args:
        student: a preset ("mobile"), a TOML file or a configuration, of which the student is
            built, as wide as the teacher and with the words of the training captions; or a
            student that was built before. None with `resume`, since a run keeps its own.
        cache: the teacher's outputs, features or scores of candidate lists, or their folder.
        recipe: a recipe's name, or settings made by hand; None is `recommended`, or what the
            resumed run was started with.
        out: the run's folder.
        changes: `key=value` texts, as after `--set`.
        resume: go on with the run in `out`.
        command: the command line of the user, kept with the run.

    Raises:
        ConfigError: a setting or a student that cannot be, or `out` holds something else.
        DataError: the cache has no images of the training split.
        ModelError: a source of the student does not load.
        MismatchError, LockedError, NonFiniteError: see `crosstill.train.train`.
    """
    path = Path(out)
    settings = choose(recipe, changes, path if resume else None)
    if not resume:
        runs.check_new(path)  # before a student is fetched or built
    source = caches.open(cache) if isinstance(cache, str | Path) else cache
    described = students.load_config(student) if isinstance(student, str | Path) else student
    if described is not None and recipe in (None, "recommended"):
        fit = for_cache(source, described.kind, settings.train_split)
        settings = fit.changed(changes)  # again: the first time refused wrong keys early
    if not isinstance(described, StudentConfig | FusionConfig):
        return train(described, source, settings, path, resume=resume, command=command)
    if resume:
        raise ConfigError(f"resume: a run keeps its student; give None in place of {student}")
    settings = fitted(source, settings)  # before a student is fetched or built
    # the other processes of torchrun read the student that the first one saves
    built = open_task(source, settings).make_student(described) if leads() else None
    return train(built, source, settings, path, command=command)
