"""Feature distillation (FD).

DSMD, arXiv 2404.10838, eq. 8. The student copies the teacher's embeddings number by number:

    L = mean over B and D of |v^s - v^t|  +  mean over B and D of |t^s - t^t|
"""

from torch import Tensor, nn

from crosstill.objectives.base import OneSided
from crosstill.objectives.parts import total
from crosstill.types import Features, Ids


class FeatureDistillation(OneSided):
    """Mean absolute difference over B and D, images plus captions.

    Args:
        side: as in `OneSided`.
    """

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        sides = self.chosen(student, teacher, ids)
        return total([nn.functional.l1_loss(s, t) for s, t, *_ in sides], student.image)
