"""Scores of a batch: dot products, softmax rows, in-batch candidates and their cross-entropies.

Entries that show the query's own image are never negatives: every function here takes the ids of
the images, or a mask made of them, and leaves such entries out.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from crosstill.types import Features


def widened(values: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if it is float32 or wider."""
    return values if values.dtype.itemsize >= 4 else values.float()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return all dot products of the rows of a (A, D) and b (B, D): (A, B), float32 or wider.

    Eight bits of mantissa, divided by a temperature of 0.05, would move a logit by 0.08.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ b.to(wide).T


class BatchLogits(NamedTuple):
    """B image rows, then B caption rows; row i and row B + i have their partner in column i."""

    student: Tensor  # (2B, B)
    teacher: Tensor  # (2B, B), without gradient
    absent: Tensor  # (2B, B) bool, other rows of the row's own image: neither right nor wrong
    target: Tensor  # (2B,) int64, the column of the true partner


def batch_logits(
    student: Features, teacher: Features, ids: Tensor, temperature: float
) -> BatchLogits:
    """Score each image against all captions and each caption against all images.

    Args:
        student: (B, D) image and text.
        teacher: (B, D) image and text.
        ids: (B,) which image each row shows.
        temperature: the divisor of the cosines.
    """
    partner = torch.arange(len(ids), device=ids.device)
    absent = (ids[:, None] == ids) & (partner[:, None] != partner)
    student_scores, teacher_scores = similarity(*student), similarity(*teacher).detach()
    return BatchLogits(
        torch.cat([student_scores, student_scores.T]) / temperature,
        torch.cat([teacher_scores, teacher_scores.T]) / temperature,
        torch.cat([absent, absent]),
        torch.cat([partner, partner]),
    )


def divergence(student: Tensor, teacher: Tensor, absent: Tensor) -> Tensor:
    """Compute KL(softmax(teacher) ‖ softmax(student)) of each row: (R,).

    Args:
        student: (R, N) logits.
        teacher: (R, N) logits.
        absent: (R, N) bool, entries left out of both softmaxes; each row keeps one or more.
    """
    log_p = teacher.masked_fill(absent, -torch.inf).log_softmax(1)
    log_q = student.masked_fill(absent, -torch.inf).log_softmax(1)
    # an absent entry is 0 * (-inf + inf), which is no number, and means 0
    return (log_p.exp() * (log_p - log_q).masked_fill(absent, 0)).sum(1)


def others(ids: Tensor) -> Tensor:
    """Return (B, B) bool: True where the column shows another image than the row; ids are (B,)."""
    return ids[:, None] != ids


def logits(queries: Tensor, partners: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return cosines of (B, D) queries and (B, D) partners over the temperature, (B, B).

    Another row of the query's own image is -inf: it is neither its partner nor a negative.
    """
    own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    scores = similarity(queries, partners) / temperature
    return scores.masked_fill(~(others(ids) | own), -torch.inf)


def diagonal_cross_entropy(logits: Tensor) -> Tensor:
    """Compute the mean over the rows of (B, B) logits of -log softmax at the diagonal."""
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def contrast(queries: Features, partners: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute InfoNCE: images against captions, captions against images, mean of both.

    Args:
        queries: (B, D) image and text.
        partners: (B, D) text and image to find; may be the same as `queries`.
        ids: (B,) which image each row shows; another row of it is no negative.
        temperature: the divisor of the cosines.
    """
    image = diagonal_cross_entropy(logits(queries.image, partners.text, ids, temperature))
    text = diagonal_cross_entropy(logits(queries.text, partners.image, ids, temperature))
    return (image + text) / 2


class Candidates(NamedTuple):
    """The N candidate partners of each of B queries, as columns of a (B, B) score matrix."""

    columns: Tensor  # (B, N) int64; column 0 is the query's own partner
    valid: Tensor  # (B, N) bool; False fills up a list that is shorter than others

    def pick(self, scores: Tensor) -> Tensor:
        """Return the (B, N) scores of these candidates out of (B, B) scores of all partners."""
        return scores.gather(1, self.columns)


def hardest(teacher: Tensor, student: Tensor, ids: Tensor, count: int) -> Candidates:
    """List each query's own partner and the other images' partners that the teacher scores best.

    A tie of the teacher goes to the one that the student scores better, so that the order of
    the batch never decides.

    Args:
        teacher: (B, B) scores, row i and column i belong together.
        student: (B, B) scores of the same pairs.
        ids: (B,), which image each row and column shows.
        count: negatives, at most; a batch that has fewer gives all that it has.

    Returns:
        N = 1 + min(count, B - 1) candidates, the negatives from hard to easy.
    """
    negative = others(ids)
    order = _descending(teacher.masked_fill(~negative, -torch.inf), student)
    order = order[:, : min(count, len(ids) - 1)]
    own = torch.arange(len(ids), device=ids.device)[:, None]
    valid = torch.cat([torch.ones_like(own, dtype=torch.bool), negative.gather(1, order)], 1)
    return Candidates(torch.cat([own, order], 1), valid)


def list_cross_entropy(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute -log softmax at column 0 of (B, N) scores, of the valid entries: (B,).

    Written as log(1 + sum_j exp(s_j - s_0)), which keeps its digits where it is almost 0; the
    focal weight of DCD divides by it.
    """
    negative = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.clone()
    negative[:, 0] = False
    # not -inf: a row without negatives would meet -inf - (-inf) on the way back
    gaps = (scores - scores[:, :1]).masked_fill(~negative, torch.finfo(scores.dtype).min)
    return functional.softplus(gaps.logsumexp(1))


def _descending(first: Tensor, second: Tensor) -> Tensor:
    """Sort the columns of each row by `first`, ties by `second`; both (B, B), highest in front."""
    order = second.argsort(dim=1, descending=True, stable=True)
    again = first.gather(1, order).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, again)
