"""Contrastive partial ranking distillation (CPRD).

Chen et al., arXiv 2407.07479: how a cross encoder teaches a dual encoder. The paper's abstract
settles four things: the teacher's ranking is distilled and not its scores; only the order of
the hard negatives counts, not that of the easy ones; the student has to rank
the valid hard negatives only; and it does so by contrast, as in the loss that it is trained with.

The rest is our reading, as only the abstract and summaries of the paper were at hand:
- the negatives are those of the batch, and the hard ones are the `hardest` that the teacher
  scores highest (the paper mines them with a dual encoder, since its teacher is too slow to
  score all pairs; a cached teacher is not);
- a hard negative is valid if the teacher scores it above the mean of the query's negatives:
  below, it is as good as easy;
- it has to beat every negative that the teacher ranks lower, be that a hard or an easy one;
  ties are not ranked, and the true partner takes no part;
- from a score cache, the hard negatives are the `hardest` of a list, valid above the mean of
  that list, and the batch's other partners, which the teacher has not scored, are easy ones;
- terms are averaged, not summed, over the valid hard negatives of a batch and over the two
  directions, and the contrastive loss of the labels is added with a weight of 1.
"""

from typing import Literal

import torch
from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.objectives.base import ListInput, Objective
from crosstill.objectives.info_nce import InfoNCE
from crosstill.objectives.parts import hardest, others, similarity
from crosstill.plugins import positive
from crosstill.types import Features, Lists

Valid = Literal["above_mean", "all"]
TIE = 1e-6  # cosines closer than this are equal: rounding may tell even equal captions apart


class CPRD(Objective):
    """Mean of -log(exp(s_k) / (exp(s_k) + sum over j ranked below k of exp(s_j))), plus task.

    s are the student's cosines over the temperature, k the valid hard negatives of a query and
    j its negatives that the teacher scores lower than k by more than rounding.

    Args:
        temperature: the divisor of the cosines, here and in the task's loss.
        hardest: hard negatives of each query; a batch with fewer other images gives all it has.
        valid: "above_mean" as above; "all" takes every hard negative as valid.
        task_weight: of the symmetric InfoNCE on the labels; 0 leaves it out.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        hardest: int = 7,
        valid: Valid = "above_mean",
        task_weight: float = 1.0,
    ) -> None:
        super().__init__()
        positive(temperature=temperature, hardest=hardest)
        if not 0 <= task_weight < float("inf"):
            raise ConfigError(f"task_weight must be 0 or above, not {task_weight}")
        self.hardest = hardest
        self.lists = ListInput(hardest)
        self.valid: Valid = valid
        self.task_weight = task_weight
        self.temperature = temperature
        self.task = InfoNCE(temperature=temperature, hardest=hardest)

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        scores = similarity(*student) / self.temperature
        target = similarity(*teacher).detach()
        ranking = (self._rank(scores, target, ids) + self._rank(scores.T, target.T, ids)) / 2
        return ranking + self.task_weight * self.task(student, teacher, ids)

    def rank(self, lists: Lists) -> Tensor:
        """Compute the loss of lists, whose first `hardest` negatives are the hard ones."""
        ranking = [self._listed(lists, direction) for direction in lists.valid]
        return torch.stack(ranking).mean() + self.task_weight * self.task.rank(lists)

    def _listed(self, lists: Lists, direction: str) -> Tensor:
        hard = slice(1, 1 + self.hardest)
        student, teacher = lists.student[direction][:, hard], lists.teacher[direction][:, hard]
        valid = lists.valid[direction][:, hard]
        easy = student[:, :0]
        if lists.features is not None:
            student, scores = student / self.temperature, similarity(*lists.features)
            scores = (scores if direction == "image" else scores.T) / self.temperature
            easy = scores.masked_fill(~others(lists.ids), -torch.inf)
        below = valid[:, None] & (teacher[:, None] < teacher[:, :, None] - TIE)  # (B, h, h)
        lower = student[:, None].masked_fill(~below, -torch.inf)
        lower = torch.cat([lower, easy[:, None].expand(-1, lower.shape[1], -1)], dim=2)
        return self._ranked(student, lower, teacher, valid, _mean(teacher, valid))

    def _rank(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        """Compute the ranking loss of the rows of two (B, B) scores, h hard negatives each."""
        negative = others(ids)
        candidates = hardest(teacher, student.detach(), ids, self.hardest)
        rank = candidates.pick(teacher)[:, 1:]
        below = negative[:, None] & (teacher[:, None] < rank[..., None] - TIE)  # (B, h, B)
        lower = student[:, None].masked_fill(~below, -torch.inf)
        own, valid = candidates.pick(student)[:, 1:], candidates.valid[:, 1:]
        return self._ranked(own, lower, rank, valid, _mean(teacher, negative))

    def _ranked(
        self, own: Tensor, lower: Tensor, rank: Tensor, valid: Tensor, mean: Tensor
    ) -> Tensor:
        """Average, over the valid ones, -log of each hard negative's share among those below it.

        Args:
            own: (B, h) the student's scores of the hard negatives.
            lower: (B, h, N) its scores of those that the teacher ranks lower, -inf for others.
            rank: (B, h) the teacher's scores of the hard negatives.
            valid: (B, h) bool; False fills up a shorter list.
            mean: (B,) the teacher's mean score of a query's negatives.
        """
        terms = torch.cat([own[..., None], lower], dim=2).logsumexp(2) - own
        if self.valid == "above_mean":
            valid = valid & (rank - TIE > mean[:, None])
        return terms.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def _mean(scores: Tensor, counted: Tensor) -> Tensor:
    """Average the counted entries of each row, 0 where there is none: two (B, N) to (B,)."""
    return scores.masked_fill(~counted, 0).sum(1) / counted.sum(1).clamp(min=1)
