"""Masked feature distillation (MFD).

CLIP-KD, arXiv 2307.12732, section 3: the student sees a photo with patches blanked out and has to
give the embedding that the teacher has of the whole one.
"""

from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.objectives.base import Input, Objective
from crosstill.objectives.parts import sides, total, widened
from crosstill.types import Features, Ids


class MaskedFeature(Objective):
    """Mean square error over B·D of the student's embedding of masked photos; images only.

    The student's image tower must be one of patches. A blanked patch has the mean colour, which
    is 0 after normalisation.

    Args:
        ratio: share of the patches that is blanked.
    """

    needs = frozenset({"image"})
    pairs = False

    def __init__(self, *, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ConfigError(f"ratio must be from 0 to below 1, not {ratio}")
        self.reads = Input("masked", ratio=ratio)

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        photos = [(widened(s), t) for s, t, *_ in sides(student, teacher, ids, ["image"])]
        return total([nn.functional.mse_loss(s, t.to(s)) for s, t in photos], student.image)
