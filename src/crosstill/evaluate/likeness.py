"""How alike a model's rows are: mean cosines between rows that show different things.

A student whose rows all point one way finds nothing, and its losses need not show it. Its own mean
cosine does not tell either: different photos of CLIP have one of about .5, those of a teacher whose
rows were centred about 0. So a student is judged beside its teacher.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

# what a student without a teacher beside it may have: the halfway mark above CLIP's own rows
LONE = 0.8
NAMES = {"image": "photos", "text": "captions"}


def mean_cosine(rows: Tensor, owner: Tensor | None = None) -> float | None:
    """Compute the mean cosine between rows of different owners.

    With the unit rows r of N owners and their sums s over each owner's n rows, it is
    (|sum r|^2 - sum |s|^2) / (N_rows^2 - sum n^2): no cosine is computed by itself.

    Args:
        rows: (N, D), of any length.
        owner: (N,) int64, the image that each row shows, below 0 one of its own; None: each row
            another.

    Returns:
        -1 to 1; None where all rows have one owner.
    """
    rows = functional.normalize(rows.double(), dim=1)
    alone = torch.arange(-len(rows), 0)  # below 0, as no other owner is
    owner = alone if owner is None else torch.where(owner < 0, alone, owner)
    owner = owner.unique(return_inverse=True)[1]
    counts = owner.bincount()
    pairs = len(rows) ** 2 - int(counts.square().sum())
    if not pairs:
        return None
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, owner, rows)
    return float((rows.sum(0).square().sum() - sums.square().sum()) / pairs)


def mean_cosines(sides: Mapping[str, Tensor], owner: Tensor) -> dict[str, float]:
    """Compute the mean cosine between different photos, and between captions of different photos.

    Args:
        sides: "image" (I, D) and "text" (T, D), or one of them.
        owner: (T,) int64, the image that each caption was written for, -1 of a loose text.

    Returns:
        By side; a side that is not there, or shows one image only, has none.
    """
    means = {s: mean_cosine(rows, owner if s == "text" else None) for s, rows in sides.items()}
    return {side: mean for side, mean in means.items() if mean is not None}


def describe_alike(student: Mapping[str, float], teacher: Mapping[str, float]) -> str | None:
    """Name the sides on which a student's rows are alike, with both mean cosines.

    They are where its mean cosine is more than halfway from the teacher's to 1; without a teacher's
    to compare with, above `LONE`.

    Returns:
        A few words for a line of a log; None where no side is alike.
    """
    parts = []
    for side, mean in student.items():
        beside = teacher.get(side)
        if mean > (LONE if beside is None else (1 + max(beside, 0.0)) / 2):
            figure = "" if beside is None else f", the teacher's {beside:.2f}"
            parts.append(f"{NAMES[side]} have a mean cosine of {mean:.2f}{figure}")
    return "; ".join(parts) or None
