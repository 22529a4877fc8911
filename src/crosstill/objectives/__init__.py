"""Losses: one file a loss, the file's name is the loss's name, its class is `Loss`.

A loss knows features and ids, never models. To add one, write `objectives/<name>.py`; nothing
else lists it: `known` reads the folder and `build` imports the file.
"""

from __future__ import annotations

from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.objectives.parts import named

__all__ = ["Objective", "build", "known"]


def known() -> list[str]:
    """The names of all losses, sorted."""
    return named.names(__name__)


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
        dim: embedding width D; only the losses that keep a queue, a bank or a layer look at it.
        seed: what a random start is drawn from.
        keys: (I,) int64 ids of the training images; only a loss with a bank looks at them.
        options: keyword arguments of that loss.

    Raises:
        ConfigError: no such loss, no such option, or a value that the option cannot have.
    """
    loss = named.find(__name__, "loss", name).Loss
    offered = {"dim": dim, "seed": seed, "keys": keys}
    given = {k: v for k, v in offered.items() if k in named.options(loss) and v is not None}
    return named.construct(loss, f"loss {name!r}", given, options)
