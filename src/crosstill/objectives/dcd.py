"""Dynamic contrastive distillation (DCD).

DCD, arXiv 2207.01426, made for fusion models that score one pair at a time (`rank`); DSMD
(arXiv 2404.10838, table 2) runs it on the batch of a dual encoder (`forward`). Each query keeps
its own partner and the negatives that the teacher scores highest, and the student learns their
scores. The teacher's doubt about a query decides between the teacher's scores and the label.

Teacher and student score the same N candidates of each of B queries; column 0 is the true partner.
With s_ij and t_ij the student's and the teacher's scores, y = [1, 0, ..., 0] and alpha = 0.2:

    H_i     = entropy of softmax_j(t_i)                     the teacher's doubt about query i
    u_i     = H_i / sum_b H_b
    MSE_i   = mean_j (s_ij - t_ij)^2
    BCE_i   = mean_j binary cross-entropy of sigmoid(s_ij) against y_j
    CE_i    = -log softmax_j(scores of i)_0                 of student (CE^s) or teacher (CE^t)

    uncertainty = alpha sum_i softmax_b((1 - u)^2)_i MSE_i  +  (1 - alpha) sum_i u_i BCE_i
    focal       = alpha mean_i (1 - exp(-CE^s_i / CE^t_i)) MSE_i  +  mean_i CE^s_i
    plain       = alpha mean_i MSE_i  +  (1 - alpha) mean_i BCE_i

The paper divides both scores by a temperature T and multiplies MSE by T^2, which cancels.

The focal weight, 1 - exp(...), is a constant to the gradient, as in WSL (arXiv 2102.00650).

A fusion model's head learns where its score 0 lies and how large scores are. Cosines do not, so
with `calibrate` a dual encoder's scores are

    s_ij = exp(g) cos_ij / tau  +  the b at which the part that reads them is least in this batch

with g learned. Such a b takes the mean error out of MSE, and makes sigmoid(s) as large on average
as y in BCE. Without it both parts move all cosines of a batch at once, which the heads of a dual
encoder do fastest by making all rows alike.

Lists may differ in length: `valid` is a (B, N) bool mask, None when every entry counts. Column 0 is
always valid; the scores of invalid entries have no effect. The functions below do not detach the
teacher's scores: the caller gives them without gradient.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.objectives.base import ListInput, Objective
from crosstill.objectives.parts import hardest, list_cross_entropy, similarity
from crosstill.plugins import positive
from crosstill.types import Features, Lists

Variant = Literal["uncertainty", "focal", "plain"]
Directions = Literal["both", "image", "text"]
Reduction = Literal["sample", "released"]

FAR = 50.0  # beyond all scores, where a sigmoid is 0 or 1
HALVINGS = 60


class DCD(Objective):
    """Weighted sum of the teacher's scores and the labels over each query's hardest candidates.

    A dual encoder's scores are cosines over the temperature; a fusion model's are its logits.

    Args:
        temperature: the divisor of the cosines.
        threshold: the cosine that scores 0, from which the labels' part takes a pair to match,
            of a dual encoder whose scores are not calibrated.
        calibrate: let a dual encoder's scores have a learned scale, and in each part the bias
            that suits it best, as above; a fusion model's logits are left as they are.
        hardest: h, negatives of each query; a batch with fewer other images gives all it has.
            Of a score cache the teacher's own, so that only h + 1 pairs reach the student.
        alpha: share of the distillation; 1 - alpha is the labels'. Under "focal" the labels' part
            keeps its full weight.
        directions: "image" ranks captions for each image, "text" the reverse; "both" is the
            mean of the two.
        variant: "uncertainty" weights by the teacher's entropy, "focal" by the student's
            cross-entropy against the teacher's; "plain" weights all alike.
        reduction: "sample" weights each query's error; "released" as the authors' code, where
            the weights do nothing.
        matching: weight of a further term on a fusion model's logits, image-text matching (ITM):
            see `matching_loss`.
    """

    def __init__(  # noqa: PLR0913  # its options are its arguments
        self,
        *,
        temperature: float = 0.05,
        threshold: float = 0.0,
        calibrate: bool = False,
        hardest: int = 7,
        alpha: float = 0.2,
        directions: Directions = "both",
        variant: Variant = "uncertainty",
        reduction: Reduction = "sample",
        matching: float = 0.0,
    ) -> None:
        super().__init__()
        positive(temperature=temperature, hardest=hardest)
        if not 0 <= matching < float("inf"):
            raise ConfigError(f"matching must be 0 or above, not {matching}")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must be between 0 and 1, not {alpha}")
        if not -1 <= threshold <= 1:
            raise ConfigError(f"threshold is a cosine, between -1 and 1, not {threshold}")
        if calibrate and threshold:
            raise ConfigError(f"threshold = {threshold}: calibrate finds the border; leave one out")
        self.temperature = temperature
        self.threshold = threshold
        self.calibrate = calibrate
        if calibrate:
            self.log_scale = nn.Parameter(torch.zeros(()))
        self.hardest = hardest
        self.alpha = alpha
        self.directions = ("image", "text") if directions == "both" else (directions,)
        self.lists = ListInput(hardest, self.directions)
        self.variant: Variant = variant
        self.reduction: Reduction = reduction
        self.matching = matching

    def expect_logits(self) -> None:
        if self.calibrate:
            self.calibrate = False
            del self.log_scale

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        scores = self._scores(similarity(*student))
        target = (similarity(*teacher).detach() - self.threshold) / self.temperature
        tables = {"image": (scores, target), "text": (scores.T, target.T)}
        terms = []
        for student_rows, teacher_rows in map(tables.__getitem__, self.directions):
            lists = hardest(teacher_rows, student_rows.detach(), ids, self.hardest)
            picked = lists.pick(student_rows), lists.pick(teacher_rows)
            terms.append(self._weighted(*picked, lists.valid, self.calibrate))
        return torch.stack(terms).mean()

    def rank(self, lists: Lists) -> Tensor:
        """Compute the loss of lists, of which the first `hardest` negatives count."""
        return torch.stack([self._listed(lists, way) for way in self.directions]).mean()

    def _listed(self, lists: Lists, direction: str) -> Tensor:
        size, dual = 1 + self.hardest, lists.features is not None
        student, teacher = lists.student[direction], lists.teacher[direction]
        return self._weighted(
            (self._scores(student) if dual else student)[:, :size],
            teacher[:, :size],
            lists.valid[direction][:, :size],
            self.calibrate and dual,
        )

    def _scores(self, cosines: Tensor) -> Tensor:
        """Scale a dual encoder's cosines."""
        scores = (cosines - self.threshold) / self.temperature
        return scores * self.log_scale.exp().to(scores) if self.calibrate else scores

    def _weighted(self, student: Tensor, teacher: Tensor, valid: Tensor, free_bias: bool) -> Tensor:
        """Compute the chosen variant of two (B, N) score lists."""
        loss = variant_loss(
            student,
            teacher,
            valid,
            variant=self.variant,
            alpha=self.alpha,
            reduction=self.reduction,
            free_bias=free_bias,
        )
        return loss + self.matching * matching_loss(student, valid) if self.matching else loss


def uncertainty(teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute u, the teacher's entropy of each query as a share of the batch's total.

    A batch whose entropies are all zero shares equally: u_i = 1 / B.

    Args:
        teacher: (B, N) scores.
        valid: (B, N) bool or None.

    Returns:
        (B,), at least 0, sums to 1.
    """
    masked = teacher if valid is None else teacher.masked_fill(~valid, -torch.inf)
    entropy = torch.special.entr(masked.softmax(1)).sum(1)
    total = entropy.sum()
    return torch.where(total > 0, entropy / total.clamp(min=_tiny(total)), 1 / len(entropy))


def confidence(uncertain: Tensor) -> Tensor:
    """Compute softmax_b((1 - u)^2), the weights of the distillation: (B,) to (B,), sum 1."""
    return (1 - uncertain).square().softmax(0)


def squared_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute MSE, the mean over each query's candidates of (s - t)^2: two (B, N) to (B,)."""
    return _row_mean(torch.square, student - teacher, valid)


def binary_cross_entropy(student: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute BCE, the mean over each query's candidates against [1, 0, ..., 0]: (B, N) to (B,)."""
    sign = torch.ones_like(student)
    sign[:, 0] = -1  # BCE is softplus(-s) for the true partner and softplus(s) for the others
    return _row_mean(nn.functional.softplus, student * sign, valid)


def matching_loss(student: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute ITM: binary cross-entropy in which true and false partners weigh the same.

    METER (arXiv 2111.02387) draws one false partner for half of its pairs. Here those of the list
    share their half, so that nothing is drawn.

    Args:
        student: (B, N) scores.
        valid: (B, N) bool or None.

    Returns:
        A scalar.
    """
    softplus = nn.functional.softplus
    true = softplus(-student[:, 0])
    kept = torch.ones_like(student, dtype=torch.bool) if valid is None else valid
    false = _row_sum(softplus, student[:, 1:], kept[:, 1:]) / kept[:, 1:].sum(1).clamp(min=1)
    return (true + false).mean() / 2


def variant_loss(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None = None,
    *,
    variant: Variant = "uncertainty",
    alpha: float = 0.2,
    reduction: Reduction = "sample",
    free_bias: bool = False,
) -> Tensor:
    """Compute one of the three sums that stand at the top of this file.

    Args:
        student: (B, N) scores.
        teacher: (B, N) scores, without gradient.
        valid: (B, N) bool or None.
        variant: "uncertainty": sure queries follow the teacher, others the labels; "focal":
            queries harder for the student than for the teacher weigh more; "plain": the
            ablation's baseline, without dynamic weights.
        alpha: share of the distillation.
        reduction: "sample" weights each query's own error. "released" is what the authors' code
            computes: the weights multiply an error that is already averaged over the batch, so
            that those of "uncertainty", which sum to 1, have no effect.
        free_bias: whether MSE and BCE see the student's scores plus the number at which each of
            them is least.

    Returns:
        A scalar.
    """
    even = torch.full_like(student[:, 0], 1 / len(student)).detach()
    if variant == "focal":
        student_loss = list_cross_entropy(student, valid)
        teacher_loss = list_cross_entropy(teacher, valid)
        # a teacher without any doubt has CE 0; a student that doubts then has weight 1
        ratio = student_loss.detach() / teacher_loss.clamp(min=_tiny(teacher_loss))
        weights = -torch.expm1(-ratio) * even
        distil = _distillation(student, teacher, valid, weights, reduction, free_bias)
        return alpha * distil + student_loss.mean()
    uncertain = even if variant == "plain" else uncertainty(teacher, valid)
    weights = even if variant == "plain" else confidence(uncertain)
    distil = _distillation(student, teacher, valid, weights, reduction, free_bias)
    bias = best_bias(student.detach(), valid, uncertain) if free_bias else 0.0
    task = (uncertain * binary_cross_entropy(student + bias, valid)).sum()
    return alpha * distil + (1 - alpha) * task


@torch.no_grad()
def best_bias(student: Tensor, valid: Tensor | None, weights: Tensor) -> Tensor:
    """Find the b at which the weighted BCE of scores + b is least, by bisection.

    There the mean of sigmoid(s + b) is that of the labels. Lists without any negative have no
    such b, and get a large one.

    Args:
        student: (B, N) scores.
        valid: (B, N) bool or None.
        weights: (B,) of the queries, sum 1.

    Returns:
        A scalar.
    """
    scores = student if valid is None else student.masked_fill(~valid, 0)
    label = (weights * _row_mean(_first_column, scores, valid)).sum()
    low, high = -scores.amax() - FAR, -scores.amin() + FAR
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mean = (weights * _row_mean(torch.sigmoid, scores + middle, valid)).sum()
        low, high = torch.where(mean < label, middle, low), torch.where(mean < label, high, middle)
    return (low + high) / 2


def _distillation(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    weights: Tensor,
    reduction: Reduction,
    free_bias: bool,
) -> Tensor:
    """Sum MSE under (B,) weights; "released" gives each query the error of the whole batch."""
    if reduction == "released":
        flat = None if valid is None else valid.reshape(1, -1)
        rows = student.reshape(1, -1), teacher.reshape(1, -1), flat, weights.sum()[None]
        return _distillation(*rows, "sample", free_bias)
    if free_bias:
        mean = (weights * _row_mean(torch.clone, student - teacher, valid)).sum() / weights.sum()
        teacher = teacher + mean.detach()
    return (weights * squared_error(student, teacher, valid)).sum()


def _row_mean(function: Callable[[Tensor], Tensor], values: Tensor, valid: Tensor | None) -> Tensor:
    """Average function(values) over the valid entries of each row: (B, N) to (B,)."""
    if valid is None:
        return function(values).mean(1)
    return _row_sum(function, values, valid) / valid.sum(1)


def _row_sum(function: Callable[[Tensor], Tensor], values: Tensor, valid: Tensor) -> Tensor:
    """Sum function(values) over the valid entries of each row: (B, N) to (B,)."""
    # before, so that no gradient passes an infinite entry; after, as function(0) may not be 0
    return function(values.masked_fill(~valid, 0)).masked_fill(~valid, 0).sum(1)


def _first_column(values: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(values[:, :1]), torch.zeros_like(values[:, 1:])], 1)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
