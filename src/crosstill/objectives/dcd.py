"""Dynamic contrastive distillation (DCD).

DCD, arXiv 2207.01426, made for fusion models that score one pair at a time (`rank`); DSMD
(arXiv 2404.10838, table 2) runs it on the batch of a dual encoder (`forward`). Each query keeps
its own partner and the negatives that the teacher finds hardest, and the student learns their
scores. How sure the teacher is of a query decides between the teacher's scores and the label.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.objectives.base import ListInput, Objective
from crosstill.objectives.parts.dcd import Reduction, focal_loss, plain_loss, uncertainty_loss
from crosstill.objectives.parts.scores import hardest, similarity
from crosstill.plugins import positive
from crosstill.types import Features, Lists

Variant = Literal["uncertainty", "focal", "plain"]
Directions = Literal["both", "image", "text"]
VARIANTS = {"uncertainty": uncertainty_loss, "focal": focal_loss, "plain": plain_loss}


class DCD(Objective):
    """Weighted sum of the teacher's scores and the labels over each query's hardest candidates.

    A dual encoder's scores are cosines over the temperature; a fusion model's are its logits.

    Args:
        temperature: the divisor of the cosines.
        threshold: the cosine that scores 0, from which the labels' part takes a pair to match. A
            fusion model's head learns where that is; a cosine of 0 is far below the cosines of
            hard negatives, so that the labels' part pushes all of them away.
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
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        threshold: float = 0.0,
        hardest: int = 7,
        alpha: float = 0.2,
        directions: Directions = "both",
        variant: Variant = "uncertainty",
        reduction: Reduction = "sample",
    ) -> None:
        super().__init__()
        positive(temperature=temperature, hardest=hardest)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha must be between 0 and 1, not {alpha}")
        if not -1 <= threshold <= 1:
            raise ConfigError(f"threshold is a cosine, between -1 and 1, not {threshold}")
        self.temperature = temperature
        self.threshold = threshold
        self.hardest = hardest
        self.alpha = alpha
        self.directions = ("image", "text") if directions == "both" else (directions,)
        self.lists = ListInput(hardest, self.directions)
        self.variant: Variant = variant
        self.reduction: Reduction = reduction

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        scores = (similarity(*student) - self.threshold) / self.temperature
        target = (similarity(*teacher).detach() - self.threshold) / self.temperature
        tables = {"image": (scores, target), "text": (scores.T, target.T)}
        terms = [self._dense(*tables[direction], ids) for direction in self.directions]
        return torch.stack(terms).mean()

    def rank(self, lists: Lists) -> Tensor:
        """Compute the loss of lists, of which the first `hardest` negatives count."""
        return torch.stack([self._listed(lists, way) for way in self.directions]).mean()

    def _listed(self, lists: Lists, direction: str) -> Tensor:
        size = 1 + self.hardest
        student, teacher = lists.student[direction], lists.teacher[direction]
        if lists.features is not None:
            student = (student - self.threshold) / self.temperature
        return self._weighted(
            student[:, :size], teacher[:, :size], lists.valid[direction][:, :size]
        )

    def _dense(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        """Compute the loss of the rows of two (B, B) score matrices."""
        lists = hardest(teacher, student.detach(), ids, self.hardest)
        return self._weighted(lists.pick(student), lists.pick(teacher), lists.valid)

    def _weighted(self, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        """Compute the chosen variant of two (B, N) score lists."""
        variant = VARIANTS[self.variant]
        return variant(student, teacher, valid, alpha=self.alpha, reduction=self.reduction)
