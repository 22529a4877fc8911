"""Weighting several losses: one file a rule, the file's name is the rule's name.

total = sum of weight * loss over all losses + penalty. A rule is a small state machine: losses
in, weights out; its state is saved with the checkpoint. The class of each file is `Balancer`.
"""

from __future__ import annotations

from collections.abc import Sequence

from crosstill.balance.base import Rule
from crosstill.objectives.parts import named

__all__ = ["Rule", "build", "known"]


def known() -> list[str]:
    """The names of all balancers, sorted."""
    return named.names(__name__)


def build(name: str, tasks: Sequence[str], **options: object) -> Rule:
    """Make the balancer of that name.

    Args:
        name: one of `known()`.
        tasks: the losses to weigh; their order is the order of rows in the saved state.
        options: keyword arguments of that balancer.

    Raises:
        ConfigError: no such balancer, no such option, or a value that the option cannot have.
    """
    rule = named.find(__name__, "balancer", name).Balancer
    return named.construct(rule, f"balancer {name!r}", {"tasks": tuple(tasks)}, options)
