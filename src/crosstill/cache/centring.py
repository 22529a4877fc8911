"""The teacher's rows less the mean of their modality, at length 1 again.

CLIP's vectors share a large mean, and photos another one than captions: a part of every cosine
that says nothing of what a photo shows. With m the mean of a modality's unit rows over the
training split,

    t' = (t - m) / |t - m|

A student that learns t' needs m at no time: its heads give rows of that space, photos and captions
alike.
"""

import copy
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from crosstill.cache import memo
from crosstill.cache.format import CacheBase

AnyCache = TypeVar("AnyCache", bound=CacheBase)

MOST = 100_000  # rows of a modality that a mean is taken of
LONG = 0.5  # length of a mean from which rows are centred by default


def centred(cache: AnyCache, split: str, center: Literal["auto"] | bool) -> AnyCache:
    """Return the cache with its rows centred, or as it is.

    Args:
        cache: the teacher's rows; a cache without features stays as it is.
        split: whose means are taken off.
        center: "auto" centres where the mean of a modality is longer than `LONG`.
    """
    cache = cache.plain
    if not cache.modalities or center is False:
        return cache
    means = {kind: _mean(cache, kind, split) for kind in sorted(cache.modalities)}
    if center == "auto" and max(mean.norm() for mean in means.values()) < LONG:
        return cache
    shifted = copy.copy(cache)
    shifted.means = means
    return shifted


def note(cache: CacheBase) -> str:
    """Say in a line why the rows of a centred cache are centred."""
    lengths = " and ".join(f"{mean.norm():.2f} ({kind})" for kind, mean in cache.means.items())
    return (
        f"the teacher's rows share a mean of length {lengths}, which is taken off; "
        "--set center=false learns them as they are"
    )


def _mean(cache: Any, kind: str, split: str) -> Tensor:
    """Return the mean (D,) of a modality's plain rows of a split, of evenly spread ones."""

    def compute() -> Tensor:
        rows = cache.split(split)
        of_kind = rows.images if kind == "image" else rows.captions
        chosen = of_kind[np.linspace(0, len(of_kind) - 1, min(len(of_kind), MOST)).astype(int)]
        take = cache.image_features if kind == "image" else cache.text_features
        return take(chosen).double().mean(0).float()

    return memo.memoised_tensor(cache, f"mean-{kind}-{split}", compute)
