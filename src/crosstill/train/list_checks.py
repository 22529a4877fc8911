"""What must fit together before anything learns from a score cache."""

from __future__ import annotations

import logging

from torch import nn

from crosstill import teachers
from crosstill.cache import ScoreCache
from crosstill.errors import ConfigError, MismatchError, ModelError
from crosstill.fusion.matcher import Matcher
from crosstill.objectives import Objective
from crosstill.students.student import Student
from crosstill.train.config import TrainConfig
from crosstill.train.lists import FALSE, Ways

log = logging.getLogger(__name__)

_ONLY_HERE = {"negatives": "hardest", "drawn": None, "towers": "frozen"}


def check_unused(config: TrainConfig) -> None:
    """Refuse settings that only a score cache gives a meaning."""
    for name, default in _ONLY_HERE.items():
        if getattr(config, name) != default:
            raise ConfigError(
                f"{name} = {getattr(config, name)}: only a run from a score cache has candidate "
                "lists or a fusion student; leave it out"
            )


def check(losses: nn.ModuleDict, cache: ScoreCache, config: TrainConfig, world: int) -> None:
    """Refuse losses and settings that a score cache cannot serve.

    Raises:
        ConfigError: a setting that cannot work here, or more negatives than candidates.
        MismatchError: a loss that needs features, or scores that the cache lacks.
    """
    blind = [name for name, loss in _named(losses) if loss.lists is None]
    if blind:
        raise MismatchError(
            f"{cache.folder} is a score cache, and these losses need features: {', '.join(blind)}; "
            "use --recipe dcd, cprd or info_nce, or make a cache of a dual encoder's features"
        )
    if world > 1:
        raise ConfigError("a run from a score cache uses one process; start it without torchrun")
    for name in ("chunk_size", "compile"):
        if getattr(config, name):
            raise ConfigError(f"{name}: a run from a score cache cannot use it; leave it out")
    taught = [name for name, loss in _named(losses) if loss.needs]
    if taught and config.negatives == "batch":
        raise ConfigError(
            f"negatives = batch: no teacher scored the batch's own pairs, and {', '.join(taught)} "
            "needs scores; use negatives=hardest or random"
        )
    if taught and cache.scores is None and config.teacher is None:
        raise MismatchError(
            f"{cache.folder} was made without a teacher, and {', '.join(taught)} needs scores; "
            "use --recipe info_nce, or set teacher to a fusion model's folder"
        )
    _check_counts(losses, cache, config)


def _check_counts(losses: nn.ModuleDict, cache: ScoreCache, config: TrainConfig) -> None:
    wanted = ways(losses)
    fewest = min(cache.least_false(config.train_split))
    if config.drawn and not config.teacher and config.drawn > fewest:
        log.warning("drawn = %d: some lists of %s hold only %d", config.drawn, cache.folder, fewest)
    held = dict(zip(("image", "text"), cache.least_false(config.train_split), strict=True))
    what = {"image": "captions of an image", "text": "images of a caption"}
    for way in wanted.names:
        has = FALSE if config.teacher else held[way]
        has = config.drawn or has if config.teacher else min(config.drawn or has, has)
        has = config.batch_size - 1 if config.negatives == "batch" else has
        if wanted.hardest > has:
            raise ConfigError(
                f"hardest = {wanted.hardest}: only {has} false {what[way]} to choose from (split "
                f"{config.train_split!r} of {cache.folder}); set hardest lower, batch_size or "
                "drawn higher, or make the score cache with more --false and --false-images"
            )


def fit(student: Student | Matcher, losses: nn.ModuleDict, config: TrainConfig) -> Matcher | None:
    """Refuse a student that the settings do not suit; open the teacher beside it, if any.

    Raises:
        ConfigError: settings of the other kind of student.
        ModelError, MismatchError: a teacher that cannot judge for this student.
    """
    if isinstance(student, Student):
        if config.towers != "frozen":
            raise ConfigError(
                f"towers = {config.towers}: {student.name} is a dual encoder; use freeze"
            )
        if config.teacher is not None:
            raise ConfigError(
                f"teacher = {config.teacher}: only a fusion student has a teacher score beside "
                "it; a dual encoder learns the cache's scores"
            )
        return None
    if config.teacher is not None and config.negatives != "hardest":
        raise ConfigError(
            f"negatives = {config.negatives}: a teacher beside the student finds the hardest; "
            "leave teacher or negatives out"
        )
    if config.freeze != "none":
        raise ConfigError(
            f"freeze = {config.freeze}: {student.name} is a fusion model; use towers=frozen or "
            "towers=train"
        )
    if config.balance.get("name") == "gradnorm":
        raise ConfigError("balance = gradnorm: a fusion model has no embeddings; use another")
    return _judge(student, config.teacher) if config.teacher else None


def _judge(student: Matcher, source: str) -> Matcher:
    judge = teachers.load(source, student.device)
    if not isinstance(judge, Matcher):
        raise ModelError(f"teacher = {source}: no fusion model, so it cannot score pairs")
    if judge.towers_digest() != student.towers_digest():
        raise MismatchError(
            f"teacher = {source}: its towers are not the student's, which it has to share; make "
            "a score cache of it instead"
        )
    return judge.requires_grad_(False).eval()


def ways(losses: nn.ModuleDict, fusion: bool = True) -> Ways:
    """Which candidate lists the losses read, and how many negatives at most.

    A loss without a teacher reads a dual encoder's batch, so that lists would be encoded in vain.
    """
    inputs = [loss.lists for _, loss in _named(losses) if loss.lists and (fusion or loss.needs)]
    if not inputs:
        return Ways((), 0)
    directions = {direction for lists in inputs for direction in lists.directions}
    return Ways(tuple(sorted(directions)), max(lists.hardest for lists in inputs))


def _named(losses: nn.ModuleDict) -> list[tuple[str, Objective]]:
    return list(losses.items())  # type: ignore[arg-type]
