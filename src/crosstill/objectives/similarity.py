"""Similarity distillation (SD).

DSMD, arXiv 2404.10838, eq. 9. The student's embedding points where the teacher's points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crosstill.objectives.base import Objective
from crosstill.objectives.parts import sides
from crosstill.types import Features


class Loss(Objective):
    """1 - (mean cosine + 1) / 2, images plus captions: 0 when aligned, 2 when opposite.

    Args:
        side: "both", or "image" or "text" alone, for a teacher that left only that.
    """

    def __init__(self, *, side: str = "both") -> None:
        super().__init__()
        self.needs = sides.check(side)
        self.side = side

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        pairs = sides.chosen(self.side, student, teacher)
        cosines = torch.stack([functional.cosine_similarity(s, t).mean() for s, t in pairs])
        return (1 - (cosines + 1) / 2).sum()
