"""Feature distillation (FD).

DSMD, arXiv 2404.10838, eq. 8. The student copies the teacher's embeddings number by number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crosstill.objectives.base import Objective
from crosstill.objectives.parts import sides
from crosstill.types import Features


class Loss(Objective):
    """Mean absolute difference over B and D, images plus captions.

    Args:
        side: "both", or "image" or "text" alone, for a teacher that left only that.
    """

    def __init__(self, *, side: str = "both") -> None:
        super().__init__()
        self.needs = sides.check(side)
        self.side = side

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        pairs = sides.chosen(self.side, student, teacher)
        return torch.stack([functional.l1_loss(s, t) for s, t in pairs]).sum()
