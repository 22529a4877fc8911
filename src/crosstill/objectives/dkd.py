"""Decoupled knowledge distillation (DKD).

Zhao et al., arXiv 2203.08679, section 3: the divergence of `kd` is TCKD + (1 - p_t) NCKD,
where p_t is the teacher's probability of the true partner. The factor silences a confident
teacher, so DKD drops it and weighs the two parts apart:

    L = T² (alpha TCKD + beta NCKD)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts import batch_logits, divergence
from crosstill.plugins import positive
from crosstill.types import Features


class DKD(Objective):
    """T² (alpha TCKD + beta NCKD) over image-to-text and text-to-image rows, mean of both.

    The target of a row is its true partner. Another row of the same image is left out.

    Args:
        temperature: the divisor that makes cosines logits.
        softening: T, as in `kd`.
        alpha: weight of TCKD, the probability of the partner.
        beta: weight of NCKD, the distribution over the others.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        softening: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
    ) -> None:
        super().__init__()
        positive(temperature=temperature, softening=softening)
        for name, weight in {"alpha": alpha, "beta": beta}.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name} must be 0 or above, not {weight}")
        self.temperature, self.softening = temperature, softening
        self.alpha, self.beta = alpha, beta

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        rows = batch_logits(student, teacher, ids, self.temperature)
        soft = rows._replace(
            student=rows.student / self.softening, teacher=rows.teacher / self.softening
        )
        tckd, nckd = decoupled(*soft)
        return self.softening**2 * (self.alpha * tckd + self.beta * nckd).mean()


def decoupled(
    student: Tensor, teacher: Tensor, absent: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute TCKD and NCKD of each row, (R,) each; both are 0 in a row that holds its target only.

    Everything stays a logarithm, so logits of any size are exact.

    Args:
        student: (R, N) logits, already divided by T.
        teacher: (R, N) logits, already divided by T.
        absent: (R, N) bool, entries that do not count.
        target: (R,) int64, each row's true column; it is never absent.
    """
    left_out = absent.scatter(1, target[:, None], True)
    alone = left_out.all(1)
    # such a row is computed as if nothing were left out, then dropped: no NaN, no gradient
    left_out = left_out & ~alone[:, None]
    odds = _log_odds(student, left_out, target)
    teacher_odds = _log_odds(teacher, left_out, target)
    hit = teacher_odds.sigmoid() * (logsigmoid(teacher_odds) - logsigmoid(odds))
    miss = (-teacher_odds).sigmoid() * (logsigmoid(-teacher_odds) - logsigmoid(-odds))
    nckd = divergence(student, teacher, left_out)
    return (hit + miss).masked_fill(alone, 0), nckd.masked_fill(alone, 0)


def _log_odds(logits: Tensor, left_out: Tensor, target: Tensor) -> Tensor:
    """Compute log(p_t / (1 - p_t)) of each row's target: (R,)."""
    others = logits - logits.gather(1, target[:, None])
    return -others.masked_fill(left_out, -torch.inf).logsumexp(1)
