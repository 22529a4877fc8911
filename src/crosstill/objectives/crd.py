"""Contrastive representation distillation (CRD).

Tian et al., arXiv 1910.10699, section 3, the contrastive loss and its memory buffer. A critic has
to tell the teacher's embedding of the row's own image from m embeddings of other images.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts import Bank, draw, similarity
from crosstill.plugins import positive
from crosstill.types import Features


class CRD(Objective):
    """Noise-contrastive estimation within each modality, images plus captions.

    The critic of student row s and teacher row t is h = exp(s·t / temperature) / Z. The positive
    is the batch's own teacher row, the negatives come from a bank of one row per image and
    modality. The loss is a sum over m negatives, as in the paper, and of the order of 10; a
    recipe gives it its weight.

    Where it differs from the paper, and why:
        * All rows of a batch share one draw of m bank rows. A draw that shows a row's own image
          does not count for that row, and the sum over the others is scaled back to m. So the
          order of the batch is irrelevant and one product serves all rows.
        * Z is estimated from the first batch that shows two images, as I times the mean of
          exp(t·t' / temperature) over its teacher rows of different images, then fixed. The
          paper takes student against bank, which at that time are both random. Teacher rows are
          known to `forward` and to `update` alike, so `forward` changes nothing.
        * Bank and critic see the embeddings themselves; there are no projection heads.

    Args:
        dim: embedding width D.
        keys: (I,) ids of the training images.
        seed: of the bank's random start and of the draws.
        temperature: the divisor of the cosines.
        negatives: m, drawn anew each step, with replacement.
        momentum: share of an image's old bank row that stays when the image is seen.

    Buffers:
        draws: () int64, the number of steps taken.
        log_z: (2,) logarithm of Z for images and for captions, -inf until it is known.
    """

    draws: Tensor
    log_z: Tensor

    def __init__(
        self,
        *,
        dim: int,
        keys: Tensor,
        seed: int = 0,
        temperature: float = 0.07,
        negatives: int = 4096,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        positive(temperature=temperature, negatives=negatives)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must be 0 or above and below 1, not {momentum}")
        self.temperature, self.negatives, self.momentum = temperature, negatives, momentum
        self.bank = Bank(keys, dim, seed)
        self._seed = seed
        self.register_buffer("draws", torch.tensor(0))
        self.register_buffer("log_z", torch.full((2,), -torch.inf))

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        rows = self.bank.locate(ids)
        drawn = draw(self._seed, int(self.draws), self.negatives, len(self.bank)).to(rows)
        own = rows[:, None] == drawn
        log_z = self._constants(teacher, ids)
        # until a batch shows two images, Z is that of unrelated rows, whose exp(0) is 1
        log_z = log_z.masked_fill(log_z.isinf(), math.log(len(self.bank)))
        banks = self.bank.entries[:, drawn]
        sides = zip(student, teacher, banks, log_z, strict=True)
        image, text = (self._side(s, t.detach(), bank, own, z) for s, t, bank, z in sides)
        return image + text

    @torch.no_grad()
    def update(self, teacher: Features, ids: Tensor) -> None:
        self.log_z.copy_(self._constants(teacher, ids))
        self.bank.blend(teacher, self.bank.locate(ids), self.momentum)
        self.draws += 1

    def _side(
        self, student: Tensor, teacher: Tensor, bank: Tensor, own: Tensor, log_z: Tensor
    ) -> Tensor:
        negatives = similarity(student, bank)
        positives = (student.to(negatives) * teacher.to(negatives)).sum(1)
        # ln(h / (m Pn)) = cosine / temperature - shift, with Pn = 1 / I
        shift = log_z + math.log(self.negatives / len(self.bank))
        positives, negatives = (x / self.temperature - shift for x in (positives, negatives))
        return estimation(positives, negatives, own).mean()

    def _constants(self, teacher: Features, ids: Tensor) -> Tensor:
        """Return log Z of both sides (2,), fixed or of this batch; -inf if that shows one image."""
        same = ids[:, None] == ids
        pairs = torch.stack([similarity(side, side) for side in teacher]).detach()
        logits = (pairs / self.temperature).masked_fill(same, -torch.inf).flatten(1)
        count = (~same).sum().clamp_min(1).to(logits)
        now = (logits.logsumexp(1) + (len(self.bank) / count).log()).to(self.log_z)
        return torch.where(self.log_z.isinf(), now, self.log_z)


def estimation(positives: Tensor, negatives: Tensor, absent: Tensor) -> Tensor:
    """Compute -[ln h⁺/(h⁺ + m Pn) + Σ ln m Pn/(h⁻ + m Pn)] of each row: (B,).

    Args:
        positives: (B,) ln(h⁺ / (m Pn)).
        negatives: (B, m) ln(h⁻ / (m Pn)).
        absent: (B, m) bool, draws that are no negatives of the row. The mean of the others times
            m stands for the sum; a row that has no others pays for its positive only.
    """
    terms = -logsigmoid(-negatives).masked_fill(absent, 0)
    counted = (~absent).sum(1).clamp_min(1)
    return negatives.shape[1] * terms.sum(1) / counted - logsigmoid(positives)
