"""Losses: one file a loss, the file's name is the loss's name, and it defines one `Objective`.

A loss knows features and ids, never models. To add one, write `objectives/<name>.py`, or declare
an entry point of another distribution: see `crosstill.plugins`. Nothing else lists it.
"""

from collections.abc import Mapping

from torch import Tensor

from crosstill import plugins
from crosstill.objectives.base import Input, ListInput, Objective

__all__ = ["LOSSES", "Input", "ListInput", "Objective", "build", "known"]

LOSSES = plugins.Kind(__name__, "loss", shared=frozenset({"base", "parts", "wrappers"}))


_GIVEN = ("dim", "seed", "keys")  # arguments that the program supplies


def known() -> list[str]:
    """Return the names of all losses, sorted."""
    return LOSSES.names()


def spelt_out(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """Add the defaults of a loss to the options that are set.

    Raises:
        ConfigError: no such loss.
    """
    return plugins.spelt_out(LOSSES.find_class(name, Objective), _GIVEN, options)


def build(
    name: str,
    *,
    dim: int | None = None,
    seed: int = 0,
    keys: Tensor | None = None,
    **options: object,
) -> Objective:
    """Make the loss of that name.

    Args:
        name: one of `known()`.
        dim: embedding width D; used by the losses that keep a queue, a bank or a layer.
        seed: of random starts.
        keys: (I,) int64 ids of the training images; used by a loss with a bank.
        options: keyword arguments of that loss.

    Raises:
        ConfigError: no such loss, no such option, or a value that the option cannot have.
    """
    loss = LOSSES.find_class(name, Objective)
    arguments = dict(zip(_GIVEN, (dim, seed, keys), strict=True))
    accepted = plugins.options(loss)
    fitting = {k: v for k, v in arguments.items() if k in accepted and v is not None}
    return plugins.construct(loss, f"loss {name!r}", fitting, options)
