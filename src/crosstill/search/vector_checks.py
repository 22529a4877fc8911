"""Check the rows that go into an index of vectors, and rank those that come out."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from crosstill.errors import ConfigError, DataError, MismatchError

NO_ROW = -1  # the id where there are fewer rows than asked for
SPARE = 8  # rows looked at beyond the k-th, to see whether it ties with the next

Ranked = tuple[np.ndarray, np.ndarray]  # scores and ids, (Q, k) each, best first


def needed(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        ConfigError: it is missing; the message names the extra to install.
    """
    if find_spec(module) is None:
        raise ConfigError(
            f"this index needs {module}; install it with: pip install 'crosstill[{extra}]'"
        )
    return import_module(module)


def checked_vectors(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Check vectors (N, D) and return them in one piece of memory.

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
    """Check ids (N,) and return them as int64.

    Raises:
        DataError: they are not whole numbers in one dimension, or one is negative.
    """
    array = np.asarray(ids)
    if array.ndim == 1 and not len(array):
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"ids: {_kind(array)} of shape {array.shape} where int64 (N,) is needed")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise DataError("ids: one is outside 0..2**63 - 1")
    return array.astype(np.int64)


def checked_rows(ids: np.ndarray, vectors: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Check ids (N,) and vectors (N, D); keep the last row of an id that comes twice.

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
    """Check how many rows to find; less than one is a `ConfigError`."""
    if k < 1:
        raise ConfigError(f"k = {k} is not possible; ask for 1 or more")
    return int(k)


def ranked(find: Callable[[int], Ranked], k: int, most: int) -> Ranked:
    """Rank the k best rows of each query: best score first, of equal scores the lower id.

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
