"""Uncertainty weighting.

Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", arXiv
1705.07115, eq. 7, with s = log of the variance, as its section 3.2 advises:

    total = sum of exp(-s) / 2 * L + s / 2    whose minimum over s is at s = log L
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crosstill.balance.base import Balancer

BOUND = 20.0  # |s| beyond this neither weighs nor pays: a loss at 0 would pull s to -infinity


class Uncertainty(Balancer):
    """Weights exp(-s) / 2, with one learnt log-variance s a loss, 0 at the start.

    The optimizer has to have it, without weight decay, which would pull the variances to 1.

    Args:
        tasks: names of the losses.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_variance = nn.Parameter(torch.zeros(len(tasks), dtype=torch.float64))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.check(losses)
        self.steps += 1
        return self.label(torch.exp(-self._bounded()) / 2, losses)

    def penalty(self) -> Tensor:
        return self._bounded().sum() / 2

    def _bounded(self) -> Tensor:
        return self.log_variance.clamp(-BOUND, BOUND)
