"""A head start: each head begins as the closed-form best map onto the teacher's features.

Random heads make the first hundreds of steps of a distillation a search for a linear map that
least squares finds in seconds; meanwhile their gradients unsettle pretrained towers. Ridge
regression from the towers' pooled states X (N, W) to the teacher's features Y (N, D):

    W = (X^T X + N r I)^-1 X^T Y,    r = penalty · mean(X^2)

The penalty is chosen from the data, by generalised cross-validation (Golub, Heath and Wahba, 1979,
eq. 1.4): the least of

    GCV(r) = RSS(r) / (1 - df(r) / N)^2,    df(r) = sum_k l_k / (l_k + r)

with l_k the eigenvalues of X^T X / N, so that one decomposition serves every penalty. A bias is
fitted by centring X and Y, and is one degree of freedom more.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from crosstill import files
from crosstill.cache import Cache, Split, memo, pixels
from crosstill.evaluate import pool_images, pool_texts
from crosstill.students.student import Student
from crosstill.train.config import TrainConfig

PENALTIES = tuple(10 ** (quarter / 4) for quarter in range(-24, 9))  # 1e-6 to 100
MOST = 20_000  # rows a side: far more than a head has columns

Side = Callable[[Student, Cache, Split], tuple[Tensor, Tensor]]


@torch.no_grad()
def start_heads(student: Student, cache: Cache, split: Split, config: TrainConfig) -> None:
    """Set a new run's heads by least squares, on the sides where the settings ask for it.

    "auto" asks for it where the tower is pretrained: rows of a random tower are no start.

    Args:
        student: its heads are random so far.
        cache: the teacher's rows as the student is to learn them.
        split: whose plain views are fitted.
        config: `init_heads` counts.
    """
    if config.init_heads == "random" or "image" not in cache.modalities:
        return
    sides = (("image", _of_images, split.images), ("text", _of_texts, split.captions))
    for side, rows, there in sides:
        wanted = config.init_heads == "ridge" or getattr(student.config, side).is_pretrained
        if wanted and len(there):
            _put(getattr(student, f"{side}_head"), _kept(student, cache, split, side, rows))


def solve(x: Tensor, y: Tensor, bias: bool, penalty: float | None = None) -> tuple[Tensor, float]:
    """Solve the ridge regression of y (N, D) on x (N, W), in float64.

    Args:
        x: rows of a tower.
        y: rows of the teacher.
        bias: whether the map has an offset.
        penalty: in units of the mean square of x; None chooses it by cross-validation.

    Returns:
        The map (W, D), with a bias (W + 1, D) whose last row is the offset; and the penalty.
    """
    x, y = x.double(), y.double()
    x_mean, y_mean = (side.mean(0) if bias else torch.zeros_like(side[0]) for side in (x, y))
    x, y, count = x - x_mean, y - y_mean, len(x)
    values, axes = torch.linalg.eigh(x.T @ x / count)
    values, onto = values.clamp_min(0), axes.T @ (x.T @ y / count)
    scale = x.square().mean().clamp_min(torch.finfo(x.dtype).tiny)
    if penalty is None:
        total = y.square().sum() / count
        scores = [_gcv(values, onto, total, p * scale, count, bias) for p in PENALTIES]
        penalty = PENALTIES[int(torch.stack(scores).argmin())]
    solution = axes @ (onto / (values + penalty * scale)[:, None])
    if bias:
        solution = torch.cat([solution, (y_mean - x_mean @ solution)[None]])
    return solution, penalty


def _gcv(
    values: Tensor, onto: Tensor, total: Tensor, ridge: Tensor, count: int, bias: bool
) -> Tensor:
    """Compute GCV of one penalty from the decomposition; infinite where no freedom is left."""
    shrunk = values + ridge
    explained = (onto.square().sum(1) * (2 / shrunk - values / shrunk.square())).sum()
    free = 1 - ((values / shrunk).sum() + bias) / count
    return torch.where(free > 0, (total - explained) / free.square(), torch.inf)


def _kept(student: Student, cache: Cache, split: Split, side: str, rows: Side) -> Tensor:
    """Return the map of one side, which depends on nothing that a run could change."""
    bias = getattr(student, f"{side}_head").bias is not None
    key = files.digest_json([student.tower_digest(side), bias, "gcv", MOST, sorted(cache.means)])
    return memo.memoised_tensor(
        cache,
        f"ridge-{key[:16]}-{split.name}",
        lambda: solve(*rows(student, cache, split), bias)[0],
    )


def _of_images(student: Student, cache: Cache, split: Split) -> tuple[Tensor, Tensor]:
    """Return the tower's and the teacher's rows of the photos."""
    photos = pool_images(student, pixels(cache, split, student.preprocess))[:MOST]
    return photos.cpu(), cache.image_features(split.images[:MOST])


def _of_texts(student: Student, cache: Cache, split: Split) -> tuple[Tensor, Tensor]:
    """Return the rows of tower and teacher for the captions; without text features, the photos'."""
    rows = _spread(split)
    texts = pool_texts(student, student.tokenize([cache.texts[row] for row in rows])).cpu()
    if "text" in cache.modalities:
        return texts, cache.text_features(rows)
    return texts, cache.image_features(cache.owner[rows])


def _spread(split: Split) -> np.ndarray:
    """Pick rows of captions, evenly spread, because neighbouring ones describe the same image."""
    rows = split.captions[np.linspace(0, len(split.captions) - 1, MOST).astype(int)]
    return split.captions if len(split.captions) <= MOST else rows


def _put(head: nn.Linear, solution: Tensor) -> None:
    """Set a head to a solved map, its last row to the bias."""
    solution = solution.to(head.weight)
    head.weight.copy_(solution[: head.in_features].T)
    if head.bias is not None:
        head.bias.copy_(solution[-1])
