"""Build each loss once for each teacher of a joined cache: see `objectives.wrappers.PerTeacher`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from crosstill.cache import CacheBase, joined
from crosstill.errors import MismatchError
from crosstill.objectives import Objective
from crosstill.objectives.wrappers import PerTeacher, TeacherMap
from crosstill.train.config import TrainConfig


def build(
    config: TrainConfig, cache: CacheBase, make: Callable[[str, int], Objective]
) -> dict[str, Objective]:
    """Make the losses of a run: `loss@teacher` of each that reads a teacher's rows, others once.

    Args:
        config: which losses.
        cache: the joined cache.
        make: the loss of a name for a teacher of that width.

    Raises:
        MismatchError: the cache is not joined.
    """
    parts = joined.parts(cache)
    if not parts:
        raise MismatchError(
            f"targets = each: {cache.folder} was not joined of several teachers' caches; make one "
            "with `crosstill join`, or leave targets out"
        )
    maps = [TeacherMap(part.columns, config.seed, config.normalise) for part in parts]
    losses: dict[str, Objective] = {}
    for name in config.losses:
        for part, target in zip(parts, maps, strict=True):
            loss = make(name, part.dim)
            if not loss.needs:
                losses[name] = loss
                break
            losses[f"{name}@{part.name}"] = PerTeacher(loss, target, part.share)
    return losses


def meet(losses: nn.ModuleDict, width: int) -> None:
    """Draw the maps from a student of that width."""
    for target in of(losses):
        target.reset(width)


def of(losses: nn.ModuleDict) -> list[TeacherMap]:
    """Return the maps of a run's losses, each once; none where the joined rows are the target."""
    return list(dict.fromkeys(x.target for x in losses.values() if isinstance(x, PerTeacher)))


def spread(options: Mapping[str, Any], losses: Iterable[str]) -> dict[str, Any]:
    """Give a balancer's `weights` of a loss to that loss of every teacher."""
    names, weights = list(losses), options.get("weights")
    if not isinstance(weights, Mapping):
        return dict(options)
    spread_weights: dict[str, Any] = {}
    for key, weight in weights.items():
        spread_weights |= {n: weight for n in names if n.partition("@")[0] == key} or {key: weight}
    # a weight for one teacher's loss goes before that of the loss
    chosen = {name: weight for name, weight in weights.items() if name in names}
    return {**options, "weights": spread_weights | chosen}
