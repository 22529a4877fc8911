"""Hard-negative distillation (HND).

DSMD, arXiv 2404.10838, eq. 10-14: the triplet loss of VSE++ (arXiv 1707.05612) between the
embeddings of student and teacher, within a modality and across. With v image rows, t text rows,
^s the student's and ^t the teacher's, m the margin, [x]+ = max(x, 0) and S = a b^T:

    row_i  = max over j != i of [m + S_ij - S_ii]+
    col_j  = max over i != j of [m + S_ij - S_jj]+
    T(a, b) = sum_i row_i + sum_j col_j
    L = T(v^s, v^t) + T(t^s, t^t) + T(v^s, t^t) + T(t^s, v^t)

The paper's negatives are all j != i; entries that show the image of row i are left out here, see
`mask_same_image`. Across modalities only the pairs of a batch count, within one all its rows.
"""

from typing import Literal

import torch
from torch import Tensor

from crosstill.errors import ConfigError
from crosstill.objectives.base import Objective
from crosstill.objectives.parts import both_ids, first_rows, similarity
from crosstill.types import Features, Ids

Negatives = Literal["hardest", "all"]


class HardNegative(Objective):
    """Sum of four triplet losses: image-image, image-text, text-image, text-text.

    Args:
        margin: m, how far (in cosine) a negative has to stay below the positive. The paper's 0
            costs nothing where all rows of the student are alike, and training may end there.
        negatives: "hardest" counts each row's and column's worst violation, as the paper's
            text; "all" sums every violation, as the authors' code does unless told otherwise.
        mask_same_image: leave out entries whose row and column show the same image. The paper
            leaves out the diagonal alone.
    """

    pairs = False

    def __init__(
        self,
        *,
        margin: float = 0.2,
        negatives: Negatives = "hardest",
        mask_same_image: bool = True,
    ) -> None:
        super().__init__()
        if negatives not in ("hardest", "all"):
            raise ConfigError(f'negatives must be "hardest" or "all", not {negatives!r}')
        if not 0 <= margin < float("inf"):
            raise ConfigError(f"margin must be 0 or above, not {margin}")
        self.margin = margin
        self.negatives: Negatives = negatives
        self.mask_same_image = mask_same_image
        # without a margin rows that are all the same violate nothing
        self.apart = "" if margin else "margin=0.2"

    def forward(self, student: Features, teacher: Features, ids: Tensor | Ids) -> Tensor:
        image_ids, text_ids, paired = both_ids(ids)
        if not self.mask_same_image:
            image_ids, text_ids = (
                torch.arange(len(x), device=x.device) for x in (image_ids, text_ids)
            )
        (image, text), (image_target, text_target) = student, teacher
        pairs, pair_targets = (first_rows(x, paired) for x in (student, teacher))
        compared = (
            (image, image_target, image_ids),
            (pairs.image, pair_targets.text, image_ids[:paired]),
            (pairs.text, pair_targets.image, image_ids[:paired]),
            (text, text_target, text_ids),
        )
        terms = [
            triplet(
                similarity(own, target.detach()),
                own_ids,
                margin=self.margin,
                negatives=self.negatives,
            )
            for own, target, own_ids in compared
            if len(own)
        ]
        return sum(terms, start=image.new_zeros(()))


def triplet(scores: Tensor, ids: Tensor, *, margin: float, negatives: Negatives) -> Tensor:
    """Compute T of eq. 10-12: violations along the rows plus along the columns, summed.

    Args:
        scores: (B, B), row i and column i belong together.
        ids: (B,); entries whose row and column share an id are no negatives.
        margin: m.
        negatives: as in `HardNegative`.
    """
    own = scores.diagonal()
    same = ids[:, None] == ids
    rows = (margin + scores - own[:, None]).relu().masked_fill(same, 0)
    columns = (margin + scores - own).relu().masked_fill(same, 0)
    if negatives == "hardest":
        return rows.amax(1).sum() + columns.amax(0).sum()
    return rows.sum() + columns.sum()
