"""In-batch similarity rows, each image against all captions and each caption against all images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosstill.objectives.parts.similarity import similarity
from crosstill.types import Features


class Rows(NamedTuple):
    """B image rows, then B caption rows; row i and row B + i have their partner in column i."""

    student: Tensor  # (2B, B) logits
    teacher: Tensor  # (2B, B) logits, without gradient
    absent: Tensor  # (2B, B) bool, other rows of the row's own image: neither right nor wrong
    target: Tensor  # (2B,) int64, the column of the true partner


def rows(student: Features, teacher: Features, ids: Tensor, temperature: float) -> Rows:
    """All rows of a batch, cosines divided by `temperature`.

    Args:
        student: (B, D) image and text.
        teacher: (B, D) image and text.
        ids: (B,) which image each row shows.
        temperature: what the cosines are divided by.
    """
    partner = torch.arange(len(ids), device=ids.device)
    absent = (ids[:, None] == ids) & (partner[:, None] != partner)
    return Rows(
        _both_ways(similarity(*student)) / temperature,
        _both_ways(similarity(*teacher).detach()) / temperature,
        torch.cat([absent, absent]),
        torch.cat([partner, partner]),
    )


def divergence(student: Tensor, teacher: Tensor, absent: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) of each row: (R,).

    Args:
        student: (R, N) logits.
        teacher: (R, N) logits.
        absent: (R, N) bool, entries left out of both softmaxes; each row keeps one or more.
    """
    log_p = teacher.masked_fill(absent, -torch.inf).log_softmax(1)
    log_q = student.masked_fill(absent, -torch.inf).log_softmax(1)
    # an absent entry is 0 * (-inf + inf), which is no number, and means 0
    return (log_p.exp() * (log_p - log_q).masked_fill(absent, 0)).sum(1)


def _both_ways(scores: Tensor) -> Tensor:
    return torch.cat([scores, scores.T])
