"""Contrastive distillation (CD).

DSMD, arXiv 2404.10838, eq. 5-7. Each student embedding has to find its teacher embedding among
K older ones of the same modality, which a queue Q holds. With s_i and t_i the student's and the
teacher's unit row i of one modality, and tau the temperature:

    L_m = -1/B sum_i log( exp(s_i.t_i / tau) / (exp(s_i.t_i / tau) + sum_k exp(s_i.Q_k / tau)) )
    L   = L_image + L_text

The batch's t_i enter the queue after the optimizer step. The sum over k leaves out the entries that
show the image of row i, which the paper keeps: see `mask_same_image`.
"""

import torch
from torch import Tensor

from crosstill.objectives.base import Objective
from crosstill.objectives.parts import Queue, sides, similarity, total
from crosstill.plugins import positive
from crosstill.types import Features, Ids


class Contrastive(Objective):
    """Cross-entropy against a queue of teacher embeddings, images plus captions.

    Args:
        dim: embedding width D.
        seed: of the queue's random start.
        temperature: tau, the divisor of the cosines.
        queue_size: K; the batch size need not divide it.
        mask_same_image: leave out queue entries that show the row's own image, which another
            of its captions put there. The paper keeps them, as negatives of themselves.
    """

    pairs = False

    def __init__(
        self,
        *,
        dim: int,
        seed: int = 0,
        temperature: float = 0.05,
        queue_size: int = 8192,
        mask_same_image: bool = True,
    ) -> None:
        super().__init__()
        positive(temperature=temperature)
        self.temperature = temperature
        self.mask_same_image = mask_same_image
        self.queue = Queue(queue_size, dim, seed)

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        terms = []
        for own, target, rows, number in sides(student, teacher, ids):
            same = (rows[:, None] == self.queue.ids[number]) & self.mask_same_image
            terms.append(self._one_side(own, target, self.queue.entries[number], same))
        return total(terms, student.image)

    def update(self, teacher: Features, ids: Tensor | Ids) -> None:
        self.queue.push(teacher, ids)

    def _one_side(self, student: Tensor, teacher: Tensor, queue: Tensor, own: Tensor) -> Tensor:
        """Compute L_m of (B, D) rows and a (K, D) queue, without the entries that `own` marks."""
        negatives = similarity(student, queue).masked_fill(own, -torch.inf)
        positives = (student.to(negatives) * teacher.to(negatives)).sum(1, keepdim=True)
        logits = torch.cat([positives, negatives], dim=1) / self.temperature
        return (logits.logsumexp(1) - logits[:, 0]).mean()
