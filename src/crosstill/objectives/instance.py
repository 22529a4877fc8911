"""Instance discrimination: the student's row of an image finds the teacher's row of it.

InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) between student and teacher within one
modality. Where CLIP-KD's interactive contrastive learning (arXiv 2307.12732, eq. 5) looks for a
student's image among the teacher's captions, this looks for it among the teacher's images, and
so works with the vectors of images alone. CLIP's image vectors lie in a narrow cone: `feature`
and `similarity` are nearly 0 for any student inside that cone, and this loss is not.
"""

from torch import Tensor

from crosstill.objectives.base import OneSided
from crosstill.objectives.parts import diagonal_cross_entropy, logits, total
from crosstill.plugins import positive
from crosstill.types import Features, Ids


class InstanceDiscrimination(OneSided):
    """Mean of student-to-teacher and teacher-to-student cross-entropy, images plus captions.

    Another row of the same image is no negative: it is left out of the denominator.

    Args:
        side: as in `OneSided`.
        temperature: the divisor of the cosines.
    """

    def __init__(self, *, side: str = "both", temperature: float = 0.05) -> None:
        super().__init__(side=side)
        positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        terms = []
        for own, other, rows, _ in self.chosen(student, teacher, ids):
            forth = diagonal_cross_entropy(logits(own, other, rows, self.temperature))
            back = diagonal_cross_entropy(logits(other, own, rows, self.temperature))
            terms.append((forth + back) / 2)
        return total(terms, student.image)
