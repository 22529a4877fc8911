"""InfoNCE without a teacher, the plain contrastive baseline.

van den Oord et al., arXiv 1807.03748, eq. 4, both ways as in CLIP (arXiv 2103.00020, fig. 3).
Over candidate lists it is the loss that METER (arXiv 2111.02387) is fine-tuned with for retrieval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.objectives.parts.candidates import contrast
from crosstill.objectives.parts.named import positive
from crosstill.objectives.parts.uncertainty import cross_entropy
from crosstill.types import Features, Lists


class Loss(Objective):
    """Mean of image-to-text and text-to-image cross-entropy over the batch.

    Another row of the same image is no negative: it is left out of the denominator.

    Args:
        temperature: what the cosines are divided by.
        hardest: negatives of each candidate list; only a fusion model has such lists here.
    """

    needs = frozenset[str]()
    ranks = True

    def __init__(self, *, temperature: float = 0.05, hardest: int = 7) -> None:
        super().__init__()
        positive(temperature=temperature, hardest=hardest)
        self.temperature = temperature
        self.hardest = hardest

    def forward(self, student: Features, teacher: Features | None, ids: Tensor) -> Tensor:
        return contrast(student, student, ids, self.temperature)

    def rank(self, lists: Lists) -> Tensor:
        """A dual encoder's batch as ever; of a fusion model, cross-entropy of each list."""
        if lists.features is not None:
            return self(lists.features, None, lists.ids)
        size = 1 + self.hardest
        ways = [
            cross_entropy(lists.student[way].scores[:, :size], valid[:, :size]).mean()
            for way, valid in lists.valid.items()
        ]
        return torch.stack(ways).mean()
