"""Weights of several losses: one file a balancer, the file's name is the balancer's name.

total = sum of weight * loss over all losses + penalty. A balancer is a small state machine: losses
in, weights out; its state is saved with the checkpoint. To add one, write `balance/<name>.py` with
one `Balancer`, or declare an entry point of another distribution: see `crosstill.plugins`.
"""

from collections.abc import Mapping, Sequence

from crosstill import plugins
from crosstill.balance.base import Balancer

__all__ = ["BALANCERS", "Balancer", "build", "known"]

BALANCERS = plugins.Kind(__name__, "balancer")


def known() -> list[str]:
    """Return the names of all balancers, sorted."""
    return BALANCERS.names()


def spelt_out(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Add the defaults of a balancer to the options that are set.

    Raises:
        ConfigError: no such balancer.
    """
    return plugins.spelt_out(BALANCERS.find_class(name, Balancer), ("tasks",), options)


def build(name: str, tasks: Sequence[str], **options: object) -> Balancer:
    """Make the balancer of that name.

    Args:
        name: one of `known()`.
        tasks: the losses to weigh; their order is the order of rows in the saved state.
        options: keyword arguments of that balancer.

    Raises:
        ConfigError: no such balancer, no such option, or a value that the option cannot have.
    """
    balancer = BALANCERS.find_class(name, Balancer)
    return plugins.construct(balancer, f"balancer {name!r}", {"tasks": tuple(tasks)}, options)
