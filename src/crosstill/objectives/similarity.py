"""Similarity distillation (SD).

DSMD, arXiv 2404.10838, eq. 9. The student's embedding points where the teacher's points.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from crosstill.objectives.base import Objective
from crosstill.types import Features


class Loss(Objective):
    """1 - (mean cosine + 1) / 2, images plus captions: 0 when aligned, 2 when opposite."""

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        image, text = (
            1 - (functional.cosine_similarity(s, t.detach()).mean() + 1) / 2
            for s, t in zip(student, teacher, strict=True)
        )
        return image + text
