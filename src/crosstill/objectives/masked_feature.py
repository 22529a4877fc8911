"""Masked feature distillation (MFD).

CLIP-KD, arXiv 2307.12732, section 3: the student sees a photo with patches blanked out and has to
give the embedding that the teacher has of the whole one.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import mse_loss

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.types import Features


class Loss(Objective):
    """Mean square error over B·D of the student's embedding of masked photos; images only.

    The student's image tower must be one of patches. A blanked patch has the mean colour, which
    is 0 after normalisation.

    Args:
        ratio: share of the patches that is blanked.
    """

    reads = "masked"
    needs = frozenset({"image"})

    def __init__(self, *, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ConfigError(f"ratio must be from 0 to below 1, not {ratio}")
        self.ratio = ratio

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        mine = student.image if student.image.dtype.itemsize >= 4 else student.image.float()
        return mse_loss(mine, teacher.image.detach().to(mine))
