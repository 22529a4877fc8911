"""Gradient normalisation.

Chen et al., "GradNorm", arXiv 1711.02257, algorithm 1: a loss whose gradient is larger than the
common size, adjusted for how slowly it falls, loses weight, and the reverse:

    g_m = norm of the gradient of L_m, over the mean of all
    r_m = (L_m / L_m at first), over the mean of all
    w_m <- w_m - lr sign(w_m g_m - mean(w g) r_m^alpha) g_m      then scaled to the sum n

The step is that of the gradient of the L1 distance |w_m g_m - mean(w g) r_m^alpha|.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstill.balance.base import Balancer
from crosstill.balance.dwa import SMALLEST
from crosstill.errors import ConfigError
from crosstill.plugins import positive

FLOOR = 1e-3  # a weight at 0 would have a gradient of 0 and never return


class GradNorm(Balancer):
    """Weights that sum to n, learnt so that the gradients of all losses have comparable norms.

    The gradients are taken at the student's features, where every loss acts, rather than at the
    last shared layer's weights; they are divided by their mean, so that the step does not depend
    on the scale of the losses. Before the first `watch` the weights are 1.

    Args:
        tasks: names of the losses.
        alpha: exponent of the rates; above 0, slowly falling losses get larger gradients. The
            paper uses 0.12 to 1.5.
        lr: of the weights.
    """

    needs_gradients = True
    chosen: Tensor
    first: Tensor
    norms: Tensor

    def __init__(self, tasks: Sequence[str], *, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(tasks)
        positive(lr=lr)
        if not 0 <= alpha < float("inf"):
            raise ConfigError(f"alpha must be 0 or above, not {alpha}")
        self.alpha, self.lr = alpha, lr
        for name, start in (("chosen", 1.0), ("first", 0.0), ("norms", 0.0)):
            self.register_buffer(name, torch.full((len(tasks),), start, dtype=torch.float64))

    def watch(self, norms: Mapping[str, Tensor]) -> None:
        self.norms.copy_(self.values(norms))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now = self.values(losses).abs().clamp_min(SMALLEST)
        if self.steps == 0:
            self.first.copy_(now)
        self.steps += 1
        if self.norms.sum() > 0:
            self._move(now)
        return self.label(self.chosen, losses)

    def _move(self, now: Tensor) -> None:
        norms = self.norms / self.norms.mean()
        pull = self.chosen * norms
        fallen = now / self.first
        rates = (fallen / fallen.mean()).clamp_max(1 / SMALLEST)
        target = pull.mean() * rates**self.alpha
        moved = (self.chosen - self.lr * torch.sign(pull - target) * norms).clamp_min(FLOOR)
        self.chosen.copy_(len(self.tasks) * moved / moved.sum())
