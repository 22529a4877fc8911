"""Hard-negative distillation (HND).

DSMD, arXiv 2404.10838, eq. 10-14: the triplet loss of VSE++ (arXiv 1707.05612) between the
embeddings of student and teacher, within a modality and across.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts.similarity import similarity
from crosstill.types import Features

Negatives = Literal["hardest", "all"]


class Loss(Objective):
    """Sum of four triplet losses: image-image, text-text, image-text, text-image.

    Args:
        margin: m, how far (in cosine) a negative has to stay below the positive.
        negatives: "hardest" counts each row's and column's worst violation, as the paper's
            text; "all" sums every violation, as the authors' code does unless told otherwise.
    """

    def __init__(self, *, margin: float = 0.0, negatives: Negatives = "hardest") -> None:
        super().__init__()
        if negatives not in ("hardest", "all"):
            raise ConfigError(f'negatives must be "hardest" or "all", not {negatives!r}')
        if not 0 <= margin < float("inf"):
            raise ConfigError(f"margin must be 0 or above, not {margin}")
        self.margin = margin
        self.negatives: Negatives = negatives

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        pairs = [(s, t.detach()) for s in student for t in teacher]
        terms = [
            triplet(similarity(s, t), ids, margin=self.margin, negatives=self.negatives)
            for s, t in pairs
        ]
        return sum(terms, start=terms[0].new_zeros(()))


def triplet(scores: Tensor, ids: Tensor, *, margin: float, negatives: Negatives) -> Tensor:
    """T of eq. 10-12: violations along the rows plus along the columns, summed.

    Args:
        scores: (B, B), row i and column i belong together.
        ids: (B,); entries whose row and column share an id are no negatives.
        margin: m.
        negatives: as in `Loss`.
    """
    own = scores.diagonal()
    same = ids[:, None] == ids
    rows = (margin + scores - own[:, None]).relu().masked_fill(same, 0)
    columns = (margin + scores - own).relu().masked_fill(same, 0)
    if negatives == "hardest":
        return rows.amax(1).sum() + columns.amax(0).sum()
    return rows.sum() + columns.sum()
