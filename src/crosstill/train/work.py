"""What a run consists of: feature caches teach pairs, score caches teach candidate lists."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from crosstill import evaluate, students
from crosstill.cache import Cache, CacheBase, ScoreCache
from crosstill.errors import MismatchError
from crosstill.evaluate.recall import Retrieval
from crosstill.fusion.matcher import Matcher
from crosstill.students.config import FusionConfig, StudentConfig
from crosstill.students.student import Student
from crosstill.train import inside, list_checks, nested, targets
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.folder import Learner
from crosstill.train.inside import Inside
from crosstill.train.list_step import ListStep
from crosstill.train.lists import DualInputs, ListStream
from crosstill.train.matched import MatchedSplit
from crosstill.train.states import Sides
from crosstill.train.step import Step
from crosstill.train.stream import Stream


class Validation(Protocol):
    """Recall after every epoch."""

    def recall(self, student: Any) -> Retrieval: ...

    def teacher_recall(self) -> Retrieval | None: ...


def make(student: StudentConfig | FusionConfig, cache: CacheBase, config: TrainConfig) -> Learner:
    """The untrained student of a run.

    Raises:
        MismatchError: a fusion model, and the cache holds features.
        ConfigError, ModelError: what cannot be built or read.
    """
    captions = cache.captions(config.train_split)
    if isinstance(student, StudentConfig):
        # each of several teachers has a map of its own, so that the width is the student's
        dim = cache.dim if config.targets == "joined" else None
        return students.build(student, dim=dim, captions=captions, seed=config.seed)
    if not isinstance(cache, ScoreCache):
        raise _no_lists(student.name, cache)
    return students.fuse(student, captions, config.seed, cache.teacher["source"])


def check(losses: nn.ModuleDict, cache: CacheBase, config: TrainConfig, group: Group) -> None:
    """Refuse what cannot be learnt from this cache, before there is a student.

    Raises:
        ConfigError, MismatchError: a setting or a loss that does not fit the cache.
    """
    if isinstance(cache, ScoreCache):
        list_checks.check(losses, cache, config, group.world)
        return
    assert isinstance(cache, Cache)
    list_checks.check_unused(config)
    inside.check(config, losses, cache, group.world)


def fit(
    student: Learner, cache: CacheBase, losses: nn.ModuleDict, config: TrainConfig
) -> Inside | Matcher | None:
    """Refuse a student that does not fit; open what runs beside it, if anything does.

    Raises:
        ConfigError, MismatchError, ModelError: it is of the wrong kind, width or towers.
    """
    if isinstance(student, Student):
        nested.fit(student, losses, cache, config)
    if isinstance(cache, ScoreCache):
        return list_checks.fit(student, losses, config)
    if isinstance(student, Matcher):
        raise _no_lists(student.name, cache)
    assert isinstance(cache, Cache)
    if config.targets == "each":
        targets.meet(losses, student.dim)
    else:
        check_width(student, cache)
    return inside.look(student, losses, config, cache)


def freeze(student: Learner, config: TrainConfig) -> None:
    """Let nothing learn that is to stay as it is."""
    if isinstance(student, Matcher):
        student.requires_grad_(True)
        if config.towers == "frozen":
            student.freeze_towers()
    elif config.freeze != "none":
        getattr(student, f"{config.freeze}_tower").requires_grad_(False)


def data(
    student: Learner, cache: CacheBase, losses: nn.ModuleDict, config: TrainConfig, group: Group
) -> tuple[Stream | ListStream, Validation]:
    """The stream of batches and the validation of a run."""
    split, val = cache.split(config.train_split), cache.split(config.val_split)
    if isinstance(student, Matcher):
        assert isinstance(cache, ScoreCache)
        sides = Sides(student, cache, split), Sides(student, cache, val)
        ways = list_checks.ways(losses)
        return ListStream(cache, split, sides[0], ways, config, group), MatchedSplit(
            cache, val, sides[1]
        )
    seen = evaluate.CachedSplit(cache, val, student, config.freeze)
    if isinstance(cache, ScoreCache):
        inputs = DualInputs(cache, split, student, config)
        ways = list_checks.ways(losses, fusion=False)
        return ListStream(cache, split, inputs, ways, config, group), seen
    assert isinstance(cache, Cache)
    return Stream(cache, split, student, config, group), seen


def step(cache: CacheBase, beside: Inside | Matcher | None, *parts: Any) -> Step:
    """The step of a run; `parts` are the arguments of `Step`."""
    if not isinstance(cache, ScoreCache):
        made = Step(*parts)
        made.inside = beside  # type: ignore[assignment]
        return made
    listed = ListStep(*parts)
    listed.judge = beside  # type: ignore[assignment]
    listed.hardest = list_checks.ways(parts[1]).hardest
    return listed


def check_width(student: Student, cache: CacheBase) -> None:
    """Refuse a student whose embeddings are not as wide as the teacher's."""
    if cache.dim is not None and student.dim != cache.dim:
        raise MismatchError(
            f"the student's embedding width is {student.dim} and the teacher's is {cache.dim}; "
            f"build the student with dim = {cache.dim}"
        )


def _no_lists(name: str, cache: CacheBase) -> MismatchError:
    return MismatchError(
        f"{name} is a fusion model, which learns candidate lists, and {cache.folder} holds none; "
        "make a score cache: crosstill cache FUSION-MODEL DATA --out DIR, or, to train a new "
        "fusion model, crosstill cache none DATA --false 31 --out DIR"
    )
