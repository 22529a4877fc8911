"""In-batch candidates: which rows may stand against each other, and which are the hardest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosstill.objectives.parts.similarity import similarity
from crosstill.types import Features


class Candidates(NamedTuple):
    """The N candidate partners of each of B queries, as columns of a (B, B) score matrix."""

    columns: Tensor  # (B, N) int64; column 0 is the query's own partner
    valid: Tensor  # (B, N) bool; False fills up a list that is shorter than others

    def pick(self, scores: Tensor) -> Tensor:
        """The (B, N) scores of these candidates out of (B, B) scores of all partners."""
        return scores.gather(1, self.columns)


def others(ids: Tensor) -> Tensor:
    """(B, B) bool: True where the column shows another image than the row, ids are (B,)."""
    return ids[:, None] != ids


def logits(queries: Tensor, partners: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Cosines of (B, D) queries and (B, D) partners over the temperature, (B, B).

    Another row of the query's own image is -inf: it is neither its partner nor a negative.
    """
    own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    scores = similarity(queries, partners) / temperature
    return scores.masked_fill(~(others(ids) | own), -torch.inf)


def cross_entropy(logits: Tensor) -> Tensor:
    """Mean over the rows of (B, B) logits of -log softmax at the diagonal."""
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def contrast(queries: Features, partners: Features, ids: Tensor, temperature: float) -> Tensor:
    """InfoNCE: images find captions, captions find images, mean of both.

    Args:
        queries: (B, D) image and text.
        partners: (B, D) text and image are looked for in; may be the same as `queries`.
        ids: (B,) which image each row shows; another row of it is no negative.
        temperature: what the cosines are divided by.
    """
    image = cross_entropy(logits(queries.image, partners.text, ids, temperature))
    return (image + cross_entropy(logits(queries.text, partners.image, ids, temperature))) / 2


def hardest(teacher: Tensor, student: Tensor, ids: Tensor, count: int) -> Candidates:
    """The own partner of each query and the other images' partners that the teacher likes best.

    A tie of the teacher goes to the one that the student likes better, so that the order of
    the batch never decides.

    Args:
        teacher: (B, B) scores, row i and column i belong together.
        student: (B, B) scores of the same pairs.
        ids: (B,), which image each row and column shows.
        count: how many negatives at most; a batch that has fewer gives all that it has.

    Returns:
        N = 1 + min(count, B - 1) candidates, the negatives from hard to easy.
    """
    negative = others(ids)
    order = _descending(teacher.masked_fill(~negative, -torch.inf), student)
    order = order[:, : min(count, len(ids) - 1)]
    own = torch.arange(len(ids), device=ids.device)[:, None]
    valid = torch.cat([torch.ones_like(own, dtype=torch.bool), negative.gather(1, order)], 1)
    return Candidates(torch.cat([own, order], 1), valid)


def _descending(first: Tensor, second: Tensor) -> Tensor:
    """Columns of each row sorted by `first`, ties by `second`; both (B, B), highest in front."""
    order = second.argsort(dim=1, descending=True, stable=True)
    again = first.gather(1, order).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, again)
