"""What every index of vectors asks of the rows it is given, and of the rows it gives back."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from crosstill.errors import ConfigError, DataError, MismatchError

NO_ROW = -1  # the id where there are fewer rows than asked for
SPARE = 8  # rows looked at beyond the k-th, to see whether it ties with the next

Found = tuple[np.ndarray, np.ndarray]


def needed(module: str, extra: str) -> Any:
    """Import a library that not every installation has.

    Raises:
        ConfigError: it is missing; the message names the extra to install.
    """
    if find_spec(module) is None:
        raise ConfigError(
            f"this index needs {module}; install it with: pip install 'crosstill[{extra}]'"
        )
    return import_module(module)


def checked_vectors(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The vectors (N, D), in one piece of memory.

    Raises:
        DataError: they are not float32, not a matrix, or not all finite.
        MismatchError: D is not the index's.
    """
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32:
        raise DataError(
            f"vectors: {_kind(vectors)} where float32 is needed; use .astype('float32')"
        )
    if vectors.ndim != 2:
        raise DataError(f"vectors: shape {vectors.shape} where (N, {dim}) is needed")
    if vectors.shape[1] != dim:
        raise MismatchError(
            f"vectors of {vectors.shape[1]} dimensions, and an index of {dim}; "
            "give vectors of the model that made the index"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(f"vectors: row {bad[0]} is not finite; leave such rows out")
    return np.ascontiguousarray(vectors)


def checked_ids(ids: np.ndarray) -> np.ndarray:
    """The ids (N,) as int64.

    Raises:
        DataError: they are not whole numbers in one dimension, or one is negative.
    """
    found = np.asarray(ids)
    if found.ndim == 1 and not len(found):
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(f"ids: {_kind(found)} of shape {found.shape} where int64 (N,) is needed")
    if found.min() < 0 or found.max() > np.iinfo(np.int64).max:
        raise DataError("ids: one is outside 0..2**63 - 1")
    return found.astype(np.int64)


def checked_rows(ids: np.ndarray, vectors: np.ndarray, dim: int) -> Found:
    """Ids (N,) and vectors (N, D) to add; of an id that comes twice, the last row alone.

    Raises:
        DataError, MismatchError: see `checked_ids` and `checked_vectors`.
    """
    ids, vectors = checked_ids(ids), checked_vectors(vectors, dim)
    if len(ids) != len(vectors):
        raise DataError(f"{len(ids)} ids for {len(vectors)} vectors; give one each")
    last = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]
    if len(last) == len(ids):
        return ids, vectors
    last.sort()
    return ids[last], vectors[last]


def checked_k(k: int) -> int:
    """How many rows to find; less than one is a `ConfigError`."""
    if k < 1:
        raise ConfigError(f"k = {k} is not possible; ask for 1 or more")
    return int(k)


def ranked(find: Callable[[int], Found], k: int, most: int) -> Found:
    """The k best rows of each query: best score first, and of equal scores the lower id.

    An index keeps any of the rows that tie at the k-th place, so that more are looked at until
    none of them ties with the last one seen.

    Args:
        find: the best so many rows of each query: scores and ids (Q, so many), best first,
            -inf and `NO_ROW` where there are no more.
        k: how many to return.
        most: how many `find` can be asked for.

    Returns:
        Scores (Q, k) and ids (Q, k); -inf and `NO_ROW` beyond the last row.
    """
    wide = min(k + SPARE, most)
    scores, ids = find(wide)
    while wide < most and _cut_in_a_tie(scores, ids, k):
        wide = min(2 * wide, most)
        scores, ids = find(wide)
    order = np.lexsort((ids, -scores))[:, :k]
    scores, ids = (np.take_along_axis(values, order, axis=1) for values in (scores, ids))
    if order.shape[1] == k:
        return scores, ids
    rest = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(scores, rest, constant_values=-np.inf),
        np.pad(ids, rest, constant_values=NO_ROW),
    )


def _cut_in_a_tie(scores: np.ndarray, ids: np.ndarray, k: int) -> bool:
    return bool(((scores[:, k - 1] == scores[:, -1]) & (ids[:, -1] != NO_ROW)).any())


def _kind(values: object) -> str:
    return str(getattr(values, "dtype", type(values).__name__))
