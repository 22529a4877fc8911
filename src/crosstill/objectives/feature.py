"""Feature distillation (FD).

DSMD, arXiv 2404.10838, eq. 8. The student copies the teacher's embeddings number by number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crosstill.objectives.parts.sides import OneSided
from crosstill.types import Features


class Loss(OneSided):
    """Mean absolute difference over B and D, images plus captions.

    `side` is that of `OneSided`.
    """

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        pairs = self.pairs(student, teacher)
        return torch.stack([functional.l1_loss(s, t) for s, t in pairs]).sum()
