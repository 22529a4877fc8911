"""Instance discrimination: the student's row of an image finds the teacher's row of it.

InfoNCE (van den Oord et al., arXiv 1807.03748, eq. 4) between student and teacher within one
modality. Where CLIP-KD's interactive contrastive learning (arXiv 2307.12732, eq. 5) looks for a
student's image among the teacher's captions, this looks for it among the teacher's images, and
so can do with the vectors of images alone. Those of CLIP lie in a narrow cone, where `feature`
and `similarity` are nearly content once the student has found the cone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosstill.objectives.parts.candidates import cross_entropy, logits
from crosstill.objectives.parts.named import positive
from crosstill.objectives.parts.sides import OneSided
from crosstill.types import Features


class Loss(OneSided):
    """Mean of student-to-teacher and teacher-to-student cross-entropy, images plus captions.

    Another row of the same image is no negative: it is left out of the denominator.

    Args:
        side: that of `OneSided`.
        temperature: what the cosines are divided by.
    """

    def __init__(self, *, side: str = "both", temperature: float = 0.05) -> None:
        super().__init__(side=side)
        positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        sides = [self._find(s, t, ids) for s, t in self.pairs(student, teacher)]
        return torch.stack(sides).sum()

    def _find(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        there = cross_entropy(logits(student, teacher, ids, self.temperature))
        return (there + cross_entropy(logits(teacher, student, ids, self.temperature))) / 2
