"""Dynamic self-adaptive loss balancer.

DSMD, arXiv 2404.10838, eq. 15-18. All losses are scaled to the magnitude of the largest, and
the ones that fall slowest get the larger share:

    scale = max L / (L + eps)    r = L / (L of the step before + eps)    r = 1 at first
    weight = total * softmax(r / temperature) * scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstill.balance.base import Rule, shares
from crosstill.errors import ConfigError
from crosstill.objectives.parts.named import positive


class Balancer(Rule):
    """Ratio of the losses as they are, which the paper's Table 10 can only come from.

    Magnitudes stand for losses, so that a negative one cannot turn a weight negative.

    Args:
        tasks: names of the losses.
        temperature: T; small values give all weight to the slowest loss.
        total: n_sum, what the shares sum to; None is the number of losses.
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
        """What the ratio is taken of, (n,)."""
        return losses

    def _rates(self, now: Tensor) -> Tensor:
        first = self.steps == 0
        smooth = torch.where(first, now, now.lerp(self.previous, self.smoothing))
        rates = torch.where(first, torch.ones_like(now), smooth / (self.previous + self.eps))
        self.previous.copy_(smooth)
        self.steps += 1
        return rates
