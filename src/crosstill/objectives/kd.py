"""Knowledge distillation (KD).

Hinton et al., arXiv 1503.02531, section 2. The classes are the batch's own captions for an image
and the batch's own images for a caption.
"""

from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.objectives.parts import batch_logits, divergence
from crosstill.plugins import positive
from crosstill.types import Features, Ids


class KD(Objective):
    """T² KL(teacher ‖ student) over image-to-text and text-to-image rows, mean of both.

    Another row of the same image is left out of both softmaxes. The teacher says how well every
    photo of the batch fits every text of it, so that nothing here needs pairs.

    Args:
        temperature: the divisor that makes cosines logits.
        softening: T of the paper. At 1 the teacher's softmax is at `temperature`, which at 0.05
            is already five times softer than the 0.01 that CLIP ends its training with; a large
            T nears a mean squared error of the logits.
    """

    pairs = False
    across = True

    def __init__(self, *, temperature: float = 0.05, softening: float = 1.0) -> None:
        super().__init__()
        positive(temperature=temperature, softening=softening)
        self.temperature = temperature
        self.softening = softening

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        if not (len(student.image) and len(student.text)):
            return student.image.new_zeros(())
        rows = batch_logits(student, teacher, ids, self.temperature)
        return softened(rows.student, rows.teacher, rows.absent, self.softening).mean()


def softened(student: Tensor, teacher: Tensor, absent: Tensor, softening: float) -> Tensor:
    """Compute T² KL(softmax(teacher / T) ‖ softmax(student / T)) of each row: (R,).

    The factor T² keeps the gradient's size when T changes.

    Args:
        student: (R, N) logits.
        teacher: (R, N) logits.
        absent: (R, N) bool, entries left out of both softmaxes.
        softening: T.
    """
    return softening**2 * divergence(student / softening, teacher / softening, absent)
