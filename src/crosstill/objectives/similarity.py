"""Similarity distillation (SD).

DSMD, arXiv 2404.10838, eq. 9. The student's embedding points where the teacher's points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crosstill.objectives.parts.sides import OneSided
from crosstill.types import Features


class Loss(OneSided):
    """1 - (mean cosine + 1) / 2, images plus captions: 0 when aligned, 2 when opposite.

    `side` is that of `OneSided`.
    """

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        pairs = self.pairs(student, teacher)
        cosines = torch.stack([functional.cosine_similarity(s, t).mean() for s, t in pairs])
        return (1 - (cosines + 1) / 2).sum()
