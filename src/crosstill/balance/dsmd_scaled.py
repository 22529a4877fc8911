"""The balancer of DSMD's released code, kept for comparison.

DSMD, arXiv 2404.10838, takes r_m of the losses (see `dsmd`); the code takes it of scaled losses:

    r_m = scale_m(k) L_m(k) / (scale_m(k-1) L_m(k-1) + eps)

A scaled loss is max_j L_j by construction, so every ratio is the same, the softmax is uniform and
the temperature has no effect: each weighted loss is total / n * max_j L_j. At the first step, which
has no ratio, the code leaves all weights at 1, without scaling.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstill.balance.dsmd import Dsmd


class DsmdScaled(Dsmd):
    """Weights as `dsmd`, but by the ratio of scaled losses and with a total of 10."""

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        temperature: float = 1.0,
        total: float = 10.0,
        smoothing: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(tasks, temperature=temperature, total=total, smoothing=smoothing, eps=eps)

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = self.steps == 0
        weights = super().weights(losses)  # takes note of the step
        return {t: torch.where(first, torch.ones_like(w), w) for t, w in weights.items()}

    def watched(self, losses: Tensor, scale: Tensor) -> Tensor:
        return losses * scale
