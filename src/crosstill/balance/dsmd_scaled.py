"""The balancer of DSMD's released code, kept for comparison.

It takes the ratio of the losses after scaling. Those are all max L by construction, so every
ratio is the same, the softmax is uniform and the temperature has no effect: each weighted loss
is total / n * max L.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from crosstill.balance import dsmd


class Balancer(dsmd.Balancer):
    """As `dsmd`, but for the ratio of scaled losses and a total of 10."""

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

    def watched(self, losses: Tensor, scale: Tensor) -> Tensor:
        return losses * scale
