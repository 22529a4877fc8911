"""Dynamic weight average.

Liu et al., "End-to-End Multi-Task Learning with Attention", arXiv 1803.10704, eq. 7: a loss
that fell slowly from one epoch to the next weighs more in the epoch after. With L_m(t) the mean of
loss m in epoch t:

    r_m(t) = L_m(t-1) / L_m(t-2)        w_m(t) = n softmax(r(t) / T)_m
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstill.balance.base import Balancer, shares
from crosstill.plugins import positive

SMALLEST = 1e-8  # an epoch's mean loss counts as no less, so that a solved loss has a ratio


class Dwa(Balancer):
    """Weights by how slowly each loss fell over the last two epochs.

    They stay the same within an epoch, sum to n, and are 1 in the first two epochs.

    Args:
        tasks: names of the losses.
        temperature: T; large values make the weights even.
    """

    mean: Tensor
    history: Tensor
    epochs: Tensor

    def __init__(self, tasks: Sequence[str], *, temperature: float = 2.0) -> None:
        super().__init__(tasks)
        positive(temperature=temperature)
        self.temperature = temperature
        self.register_buffer("mean", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("history", torch.ones(2, len(tasks), dtype=torch.float64))
        self.register_buffer("epochs", torch.tensor(0))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.steps += 1
        self.mean += (self.values(losses) - self.mean) / self.steps
        before, last = self.history.abs().clamp_min(SMALLEST)
        return self.label(shares(last / before, self.temperature, len(self.tasks)), losses)

    def end_epoch(self) -> None:
        """Store the epoch's means; an epoch without steps does not count."""
        if self.steps == 0:
            return
        self.epochs += 1
        before = self.history[1] if self.epochs > 1 else self.mean
        self.history.copy_(torch.stack([before, self.mean]))
        self.mean.zero_()
        self.steps.zero_()
