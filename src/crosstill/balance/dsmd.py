"""Dynamic self-adaptive loss balancer.

DSMD, arXiv 2404.10838, eq. 15-18. All losses are scaled to the magnitude of the largest, and
the ones that fall slowest get the larger share. With L_m(k) loss m of n at step k:

    scale_m = max_j L_j(k) / (L_m(k) + eps)
    r_m     = L_m(k) / (L_m(k-1) + eps),  1 at the first step
    w_m     = total * softmax(r / T)_m
    loss    = sum_m w_m * scale_m * L_m(k)

so that the weight given to loss m is w_m * scale_m. Nothing in it has a gradient.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstill.balance.base import Balancer, shares
from crosstill.errors import ConfigError
from crosstill.plugins import positive


class Dsmd(Balancer):
    """Weights by the ratio of unscaled losses; the paper's Table 10 can come from no other.

    Absolute values stand for losses, so that a negative loss cannot turn a weight negative.

    Args:
        tasks: names of the losses.
        temperature: T; small values give all weight to the slowest loss.
        total: n_sum, the sum of the shares; None is the number of losses.
        smoothing: of the losses in the ratio, s = smoothing * s + (1 - smoothing) * L; 0 is
            the paper's ratio of single steps, which is noisy.
        eps: keeps the two quotients finite.
    """

    previous: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        temperature: float = 1.0,
        total: float | None = None,
        smoothing: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(tasks)
        self.total = float(len(tasks)) if total is None else total
        positive(temperature=temperature, total=self.total, eps=eps)
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing must be from 0 to below 1, not {smoothing}")
        self.temperature, self.smoothing, self.eps = temperature, smoothing, eps
        self.register_buffer("previous", torch.zeros(len(tasks), dtype=torch.float64))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now = self.values(losses).abs()
        scale = now.max() / (now + self.eps)
        rates = self._rates(self.watched(now, scale))
        return self.label(shares(rates, self.temperature, self.total) * scale, losses)

    def watched(self, losses: Tensor, scale: Tensor) -> Tensor:
        """Return the values whose ratio is taken, (n,): the losses as they are."""
        return losses

    def _rates(self, now: Tensor) -> Tensor:
        first = self.steps == 0
        smooth = torch.where(first, now, now.lerp(self.previous, self.smoothing))
        rates = torch.where(first, torch.ones_like(now), smooth / (self.previous + self.eps))
        self.previous.copy_(smooth)
        self.steps += 1
        return rates
