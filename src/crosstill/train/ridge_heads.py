"""A head start: each head begins as the closed-form best map onto the teacher's features.

Random heads make the first hundreds of steps of a distillation a search for a linear map that
least squares finds in seconds; meanwhile their gradients unsettle pretrained towers, and a
hardest-negative loss can pull everything into one point. Ridge regression from the towers'
pooled states X to the teacher's features Y, with the penalty in units of X's mean square:

    W = (X^T X + penalty · N · mean(X^2) · I)^-1 X^T Y
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from crosstill import files
from crosstill.cache import Cache, Split, memo, pixels
from crosstill.evaluate import pool_images, pool_texts
from crosstill.students.student import Student

PENALTY = 1e-3
MOST = 20_000  # rows a side: far more than a head has columns


@torch.no_grad()
def ridge_heads(student: Student, cache: Cache, split: Split) -> None:
    """Set both heads of a student from the plain views of a split."""
    _put(student.image_head, _kept(student, cache, split, "image", _of_images))
    _put(student.text_head, _kept(student, cache, split, "text", _of_texts))


Side = Callable[[Student, Cache, Split], tuple[Tensor, Tensor]]


def _kept(student: Student, cache: Cache, split: Split, side: str, rows: Side) -> Tensor:
    """Return the map of one side, which depends on nothing that a run could change."""
    head = getattr(student, f"{side}_head")
    bias = head.bias is not None
    key = files.digest_json([student.tower_digest(side), bias, PENALTY, MOST])
    return memo.memoised_tensor(
        cache, f"ridge-{key[:16]}-{split.name}", lambda: _fit(*rows(student, cache, split), bias)
    )


def _of_images(student: Student, cache: Cache, split: Split) -> tuple[Tensor, Tensor]:
    """Return the tower's and the teacher's rows of the photos."""
    photos = pool_images(student, pixels(cache, split, student.preprocess))[:MOST]
    return photos, cache.image_features(split.images[:MOST])


def _of_texts(student: Student, cache: Cache, split: Split) -> tuple[Tensor, Tensor]:
    """Return the rows of tower and teacher for the captions; without text features, the photos'."""
    rows = _spread(split)
    texts = pool_texts(student, student.tokenize([cache.texts[row] for row in rows]))
    if "text" in cache.modalities:
        return texts, cache.text_features(rows)
    return texts, cache.image_features(cache.owner[rows])


def _spread(split: Split) -> np.ndarray:
    """Pick rows of captions, evenly spread, because neighbouring ones describe the same image."""
    rows = split.captions[np.linspace(0, len(split.captions) - 1, MOST).astype(int)]
    return split.captions if len(split.captions) <= MOST else rows


def solve(x: Tensor, y: Tensor, penalty: float = PENALTY) -> Tensor:
    """Solve the ridge regression of y (N, D) on x (N, W): the (W, D) map, in float64."""
    x, y = x.double(), y.double()
    ridge = penalty * len(x) * x.square().mean() * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y)


def _fit(x: Tensor, y: Tensor, bias: bool) -> Tensor:
    """Fit the map of a head, float64; a bias is the map of a column of ones."""
    x = x.cpu()
    return solve(torch.cat([x, torch.ones(len(x), 1)], dim=1) if bias else x, y)


def _put(head: nn.Linear, solution: Tensor) -> None:
    """Set a head to a solved map, its last row to the bias."""
    solution = solution.to(head.weight)
    head.weight.copy_(solution[: head.in_features].T)
    if head.bias is not None:
        head.bias.copy_(solution[-1])
