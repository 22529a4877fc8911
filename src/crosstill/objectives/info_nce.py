"""InfoNCE without a teacher, the plain contrastive baseline.

van den Oord et al., arXiv 1807.03748, eq. 4, both ways as in CLIP (arXiv 2103.00020, fig. 3). With
v_i and t_i the student's image and text row i, and tau the temperature:

    L = 1/2B sum_i ( -log softmax_j(v_i.t_j / tau)_i  -  log softmax_j(t_i.v_j / tau)_i )

Over candidate lists it is the loss that METER (arXiv 2111.02387) is fine-tuned with for retrieval.
"""

import torch
from torch import Tensor

from crosstill.objectives.base import ListInput, Objective
from crosstill.objectives.parts import contrast, list_cross_entropy
from crosstill.plugins import positive
from crosstill.types import Features, Lists


class InfoNCE(Objective):
    """Mean of image-to-text and text-to-image cross-entropy over the batch.

    Another row of the same image is no negative: it is left out of the denominator.

    Args:
        temperature: the divisor of the cosines.
        hardest: negatives of each candidate list; only a fusion model has such lists here.
    """

    needs = frozenset[str]()

    def __init__(self, *, temperature: float = 0.05, hardest: int = 7) -> None:
        super().__init__()
        positive(temperature=temperature, hardest=hardest)
        self.temperature = temperature
        self.hardest = hardest
        self.lists = ListInput(hardest)

    def forward(self, student: Features, teacher: Features | None, ids: Tensor) -> Tensor:
        return contrast(student, student, ids, self.temperature)

    def rank(self, lists: Lists) -> Tensor:
        """Compute the batch's loss of a dual encoder; of a fusion model, that of each list."""
        if lists.features is not None:
            return self(lists.features, None, lists.ids)
        size = 1 + self.hardest
        directions = [
            list_cross_entropy(lists.student[direction][:, :size], valid[:, :size]).mean()
            for direction, valid in lists.valid.items()
        ]
        return torch.stack(directions).mean()
