"""A head start: each head begins as the closed-form best map onto the teacher's features.

Random heads make the first hundreds of steps of a distillation a search for a linear map that
least squares finds in seconds; meanwhile their gradients unsettle pretrained towers, and a
hardest-negative loss can pull everything into one point. Ridge regression from the towers'
pooled states X to the teacher's features Y, with the penalty in units of X's mean square:

    W = (X^T X + penalty · N · mean(X^2) · I)^-1 X^T Y
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from crosstill.cache import Cache, Split, pixels
from crosstill.evaluate import pool_images, pool_texts
from crosstill.students.student import Student

PENALTY = 1e-3
MOST = 20_000  # rows a side: far more than a head has columns


@torch.no_grad()
def ridge_heads(student: Student, cache: Cache, split: Split) -> None:
    """Set both heads of a student from the plain views of a split."""
    photos = pool_images(student, pixels(cache, split, student.preprocess))[:MOST]
    _fit(student.image_head, photos, cache.image_features(split.images[:MOST]))
    # evenly spread, because neighbouring captions describe the same image
    rows = split.captions[np.linspace(0, len(split.captions) - 1, MOST).astype(int)]
    rows = split.captions if len(split.captions) <= MOST else rows
    texts = pool_texts(student, student.tokenize([cache.texts[row] for row in rows]))
    _fit(student.text_head, texts, cache.text_features(rows))


def solve(x: Tensor, y: Tensor, penalty: float = PENALTY) -> Tensor:
    """Ridge regression of y (N, D) on x (N, W): the (W, D) map, in float64."""
    x, y = x.double(), y.double()
    ridge = penalty * len(x) * x.square().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y)


def _fit(head: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Put the map into a head; a bias is the map of a column of ones."""
    x = x.cpu()
    if head.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    found = solve(x, y).to(head.weight)
    head.weight.copy_(found[: head.in_features].T)
    if head.bias is not None:
        head.bias.copy_(found[-1])
