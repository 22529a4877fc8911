"""Similarity distillation (SD).

DSMD, arXiv 2404.10838, eq. 9. The student's embeddings point where the teacher's point:

    L = 1 - (mean_i cos(v^s_i, v^t_i) + 1) / 2  +  1 - (mean_i cos(t^s_i, t^t_i) + 1) / 2
"""

from torch import Tensor, nn

from crosstill.objectives.base import OneSided
from crosstill.objectives.parts import total
from crosstill.types import Features, Ids


class SimilarityDistillation(OneSided):
    """1 - (mean cosine + 1) / 2, images plus captions: 0 when aligned, 2 when opposite.

    Args:
        side: as in `OneSided`.
    """

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        sides = self.chosen(student, teacher, ids)
        cosines = [nn.functional.cosine_similarity(s, t).mean() for s, t, *_ in sides]
        return total([1 - (cosine + 1) / 2 for cosine in cosines], student.image)
