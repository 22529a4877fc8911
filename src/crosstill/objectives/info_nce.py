"""InfoNCE without a teacher, the plain contrastive baseline.

van den Oord et al., arXiv 1807.03748, eq. 4, both ways as in CLIP (arXiv 2103.00020, fig. 3).
"""

from __future__ import annotations

from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.objectives.parts.candidates import contrast
from crosstill.objectives.parts.named import positive
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
        return contrast(student, student, ids, self.temperature)
