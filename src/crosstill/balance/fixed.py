"""Constant weights; all 1 is the "no balancer" row of DSMD's Table 5."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstill.balance.base import Balancer
from crosstill.errors import ConfigError, unknown


class Fixed(Balancer):
    """Weights that never change.

    Args:
        tasks: names of the losses.
        weights: task -> weight, 0 or above; a loss that is not named has weight 1.
    """

    chosen: Tensor

    def __init__(self, tasks: Sequence[str], *, weights: Mapping[str, float] | None = None) -> None:
        super().__init__(tasks)
        chosen = dict(weights or {})
        for task, weight in chosen.items():
            if task not in tasks:
                raise unknown("loss to weigh", task, tasks)
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"the weight of {task} must be 0 or above, not {weight}")
        rows = [float(chosen.get(task, 1.0)) for task in tasks]
        self.register_buffer("chosen", torch.tensor(rows, dtype=torch.float64))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.check(losses)
        self.steps += 1
        return self.label(self.chosen, losses)
