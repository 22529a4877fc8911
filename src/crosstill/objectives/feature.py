"""Feature distillation (FD).

DSMD, arXiv 2404.10838, eq. 8. The student copies the teacher's embeddings number by number.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from crosstill.objectives.base import Objective
from crosstill.types import Features


class Loss(Objective):
    """Mean absolute difference over B and D, images plus captions."""

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        image, text = (
            functional.l1_loss(s, t.detach()) for s, t in zip(student, teacher, strict=True)
        )
        return image + text
