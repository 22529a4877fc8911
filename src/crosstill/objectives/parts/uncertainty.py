"""Dynamic contrastive distillation on candidate lists, without a model in sight.

DCD, arXiv 2207.01426. The teacher and the student score the same N candidates of each of B
queries; column 0 is the true partner. Lists may differ in length: `valid` is a (B, N) bool
mask, None when every entry counts. Column 0 is always valid. The scores of invalid entries are
never looked at. Nothing here detaches: the caller gives teacher scores without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from crosstill.types import CandidateScores

Reduction = Literal["sample", "released"]


def uncertainty(teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """How unsure the teacher is of each query, as a share of the batch's whole unsureness.

    u_i = H_i / sum_b H_b with H_i the entropy of softmax(teacher_i). A batch whose entropies
    are all zero shares equally: u_i = 1 / B.

    Args:
        teacher: (B, N) scores.
        valid: (B, N) bool or None.

    Returns:
        (B,), at least 0, sums to 1.
    """
    entropy = torch.special.entr(_masked(teacher, valid).softmax(1)).sum(1)
    whole = entropy.sum()
    return torch.where(whole > 0, entropy / whole.clamp(min=_tiny(whole)), 1 / len(entropy))


def confidence(uncertain: Tensor) -> Tensor:
    """Weights softmax_b((1 - u)^2) of the distillation: (B,) to (B,), they sum to 1."""
    return (1 - uncertain).square().softmax(0)


def squared_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over each query's candidates of (student - teacher)^2: two (B, N) to (B,)."""
    return _row_mean(torch.square, student - teacher, valid)


def binary_cross_entropy(student: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over each query's candidates of BCE of sigmoid(score) with [1, 0, ..., 0]: (B,)."""
    sign = torch.ones_like(student)
    sign[:, 0] = -1  # BCE is softplus(-s) for the true partner and softplus(s) for the others
    return _row_mean(functional.softplus, student * sign, valid)


def cross_entropy(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """-log softmax at column 0 of (B, N) scores: (B,).

    Written as log(1 + sum_j exp(s_j - s_0)), which keeps its digits where it is almost 0; the
    focal weight divides by it.
    """
    negative = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.clone()
    negative[:, 0] = False
    # not -inf: a row without negatives would meet -inf - (-inf) on the way back
    gaps = (scores - scores[:, :1]).masked_fill(~negative, torch.finfo(scores.dtype).min)
    return functional.softplus(gaps.logsumexp(1))


def uncertainty_loss(
    student: CandidateScores,
    teacher: CandidateScores,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.2,
    softening: float = 1.0,
    reduction: Reduction = "sample",
) -> Tensor:
    """Sure samples learn from the teacher, unsure ones from the labels.

    alpha T^2 sum_i softmax_b((1 - u)^2)_i mean_j ((s_ij - t_ij) / T)^2
      + (1 - alpha) sum_i u_i BCE(s_i, [1, 0, ..., 0])

    Args:
        student: (B, N).
        teacher: (B, N), without gradient.
        valid: (B, N) bool or None.
        alpha: share of the distillation.
        softening: T; both scores are divided by it and the error multiplied by T^2, so that it
            cancels. It is here because the paper has it.
        reduction: "sample" weights each query's own error. "released" is what the authors' code
            computes: the weights multiply an error that is already averaged over the batch, and
            as they sum to 1 they have no effect.

    Returns:
        A scalar.
    """
    uncertain = uncertainty(teacher.scores, valid)
    error = _error(student, teacher, valid, softening, reduction)
    distil = softening**2 * (confidence(uncertain) * error).sum()
    task = (uncertain * binary_cross_entropy(student.scores, valid)).sum()
    return alpha * distil + (1 - alpha) * task


def focal_loss(
    student: CandidateScores,
    teacher: CandidateScores,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.2,
    softening: float = 1.0,
    reduction: Reduction = "sample",
) -> Tensor:
    """Samples that the student finds harder than the teacher does learn more from the teacher.

    alpha T^2 mean_i (w_i MSE_i) + mean_i CE^s_i  with  w_i = 1 - exp(-CE^s_i / CE^t_i),
    where CE is the softmax cross-entropy of the true partner among the candidates.

    Args and the result are those of `uncertainty_loss`; under "released" the mean of the
    weights multiplies the batch's error.
    """
    paid = cross_entropy(student.scores, valid)
    due = cross_entropy(teacher.scores, valid)
    # a teacher without any doubt has CE 0; a student that doubts then has weight 1
    weight = -torch.expm1(-paid / due.clamp(min=_tiny(due)))
    error = _error(student, teacher, valid, softening, reduction)
    return alpha * softening**2 * (weight * error).mean() + paid.mean()


def plain_loss(
    student: CandidateScores,
    teacher: CandidateScores,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.2,
    softening: float = 1.0,
    reduction: Reduction = "sample",
) -> Tensor:
    """No dynamic weights: every sample counts 1 / B in both terms. The ablation's baseline.

    Args and the result are those of `uncertainty_loss`.
    """
    error = _error(student, teacher, valid, softening, reduction)
    task = binary_cross_entropy(student.scores, valid)
    return alpha * softening**2 * error.mean() + (1 - alpha) * task.mean()


def _error(
    student: CandidateScores,
    teacher: CandidateScores,
    valid: Tensor | None,
    softening: float,
    reduction: Reduction,
) -> Tensor:
    """Squared error of the softened scores, (B,); "released" gives each query the batch's."""
    soft = student.scores / softening, teacher.scores / softening
    if reduction == "sample":
        return squared_error(*soft, valid)
    flat = None if valid is None else valid.reshape(1, -1)
    whole = squared_error(soft[0].reshape(1, -1), soft[1].reshape(1, -1), flat)
    return whole.expand(len(soft[0]))


def _masked(scores: Tensor, valid: Tensor | None) -> Tensor:
    return scores if valid is None else scores.masked_fill(~valid, -torch.inf)


def _row_mean(function: Callable[[Tensor], Tensor], values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of function(values) over the valid entries of each row: (B, N) to (B,)."""
    if valid is None:
        return function(values).mean(1)
    # before, so that no gradient passes an infinite entry; after, as function(0) may not be 0
    known = function(values.masked_fill(~valid, 0)).masked_fill(~valid, 0)
    return known.sum(1) / valid.sum(1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
