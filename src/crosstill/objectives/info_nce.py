"""InfoNCE without a teacher, the plain contrastive baseline.

van den Oord et al., arXiv 1807.03748, eq. 4, both ways as in CLIP (arXiv 2103.00020, fig. 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.objectives.parts.named import positive
from crosstill.objectives.parts.similarity import similarity
from crosstill.types import Features


class Loss(Objective):
    """Mean of image-to-text and text-to-image cross-entropy over the batch.

    Another row of the same image is no negative: it is left out of the denominator.

    Args:
        temperature: what the cosines are divided by.
    """

    needs = frozenset[str]()

    def __init__(self, *, temperature: float = 0.05) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features | None, ids: Tensor) -> Tensor:
        logits = similarity(*student) / self.temperature
        own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        logits = logits.masked_fill((ids[:, None] == ids) & ~own, -torch.inf)
        found = logits.diagonal()
        return ((logits.logsumexp(1) - found) + (logits.logsumexp(0) - found)).mean() / 2
