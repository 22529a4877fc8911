"""One target a teacher: on a joined cache, a loss is computed on each teacher's own rows.

The student learns one space for all of them. For each teacher it has a linear map from that space
to the teacher's, which learns with the student, is kept with the losses, and is no part of the
student afterwards. Images and captions share the map, and it only turns: it keeps lengths and
angles, as far as the teacher is wide enough. So a cosine that is right in the teacher's space is
right in the student's own, where retrieval takes place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from crosstill.cache import CacheBase, joined
from crosstill.errors import MismatchError
from crosstill.objectives import Objective
from crosstill.train.config import TrainConfig
from crosstill.types import Features


class Target(nn.Module):
    """One teacher of a joined cache.

    Args:
        part: which columns are its rows, and what it counts.
        seed: of the map's start.
        unit: whether losses see unit rows of the student.

    Attributes:
        weight: (D, d), √d times the map, so that a step of Adam turns it by about the learning
            rate.
    """

    weight: nn.Parameter

    def __init__(self, part: joined.Part, seed: int, unit: bool) -> None:
        super().__init__()
        self.part, self._seed, self._unit = part, seed, unit

    def meet(self, width: int) -> None:
        """Make the map for a student of that width, anew."""
        generator = torch.Generator().manual_seed(self._seed)
        start = nn.init.orthogonal_(torch.empty(self.part.dim, width), generator=generator)
        self.weight = nn.Parameter(start * width**0.5)

    @property
    def map(self) -> Tensor:
        """(D, d), with orthonormal columns; where D < d with orthonormal rows."""
        return self.weight / self.weight.shape[1] ** 0.5

    def begin(self, basis: Tensor) -> None:
        """Start the map of a student whose coordinates are those of an orthonormal basis.

        Args:
            basis: (all D, d), joined rows are about `basis @ student`; columns of zeros leave
                the map as it is.
        """
        used = basis.any(0)
        start = self.map.detach().to(basis)
        start[:, used] = basis[self.part.columns, used].to(start)
        u, _, v = torch.linalg.svd(start, full_matrices=False)
        self._put(u @ v)

    def settle(self) -> None:
        """After a step: back to the nearest map that keeps angles, by one Newton iteration.

        W (3 - W^T W) / 2 is enough for what one step changes (Björck and Bowie, SIAM J. Numer.
        Anal. 8:358, 1971).
        """
        now = self.map.detach()
        self._put(1.5 * now - 0.5 * now @ (now.T @ now))

    @torch.no_grad()
    def _put(self, found: Tensor) -> None:
        self.weight.copy_(found * self.weight.shape[1] ** 0.5)

    def carry(self, student: Features) -> Features:
        """The student's rows in the teacher's space: (B, d) → (B, D)."""
        rows = (linear(side, self.map.to(side)) for side in student)
        return Features(*(normalize(side, dim=1) if self._unit else side for side in rows))

    def take(self, teacher: Features) -> Features:
        """The teacher's own unit rows out of the joined ones; an empty side stays empty."""
        own = (side[:, self.part.columns] if side.ndim == 2 else side for side in teacher)
        return Features(*(normalize(side, dim=-1) for side in own))


class OfTeacher(Objective):
    """A loss on one teacher's rows; it counts as much as the teacher does."""

    def __init__(self, loss: Objective, target: Target) -> None:
        super().__init__()
        self.loss, self.target = loss, target
        self.needs, self.reads, self.ratio = loss.needs, loss.reads, loss.ratio
        self.share = target.part.share

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        value: Tensor = self.loss(self.target.carry(student), self.target.take(teacher), ids)
        return value

    def update(self, teacher: Features, ids: Tensor) -> None:
        self.target.settle()
        self.loss.update(self.target.take(teacher), ids)


def build(
    config: TrainConfig, cache: CacheBase, make: Callable[[str, int], Objective]
) -> dict[str, Objective]:
    """The losses of a run: `loss@teacher` of each that reads a teacher's rows, others once.

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
    targets = [Target(part, config.seed, config.normalise) for part in parts]
    losses: dict[str, Objective] = {}
    for name in config.losses:
        for target in targets:
            loss = make(name, target.part.dim)
            if not loss.needs:
                losses[name] = loss
                break
            losses[f"{name}@{target.part.name}"] = OfTeacher(loss, target)
    return losses


def meet(losses: nn.ModuleDict, width: int) -> None:
    """Make the maps from a student of that width."""
    for target in of(losses):
        target.meet(width)


def of(losses: nn.ModuleDict) -> list[Target]:
    """The targets of a run's losses, each once; none where the joined rows are the only one."""
    return list(dict.fromkeys(x.target for x in losses.values() if isinstance(x, OfTeacher)))


def spread(options: Mapping[str, Any], losses: Iterable[str]) -> dict[str, Any]:
    """A balancer's options, where `weights` of a loss are those of it for every teacher."""
    names, weights = list(losses), options.get("weights")
    if not isinstance(weights, Mapping):
        return dict(options)
    found: dict[str, Any] = {}
    for key, weight in weights.items():
        found |= {n: weight for n in names if n.partition("@")[0] == key} or {key: weight}
    # a weight for one teacher's loss goes before that of the loss
    return {**options, "weights": found | {k: w for k, w in weights.items() if k in names}}
