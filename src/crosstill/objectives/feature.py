"""Feature distillation (FD).

DSMD, arXiv 2404.10838, eq. 8. The student copies the teacher's embeddings number by number:

    L = mean over B and D of |v^s - v^t|  +  mean over B and D of |t^s - t^t|
"""

import torch
from torch import Tensor, nn

from crosstill.objectives.base import OneSided
from crosstill.types import Features


class FeatureDistillation(OneSided):
    """Mean absolute difference over B and D, images plus captions.

    Args:
        side: as in `OneSided`.
    """

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        pairs = self.pairs(student, teacher)
        return torch.stack([nn.functional.l1_loss(s, t) for s, t in pairs]).sum()
