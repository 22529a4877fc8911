"""The protocol of an index of vectors, and the kinds that there are.

    memory_vectors    in the memory of this process, saved as files
    milvus_vectors    a Milvus cluster, or a Milvus Lite file

No library is imported before an index of its kind is opened. Another distribution may offer
further kinds: the place NAME://... opens the entry point NAME of the group that `INDEXES` names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from crosstill import plugins
from crosstill.errors import ConfigError, DataError, MismatchError, unknown

NO_ROW = -1  # the id where there are fewer rows than asked for
SPARE = 8  # rows looked at beyond the k-th, to see whether it ties with the next

KINDS = ("flat", "codes", "hnsw")  # in memory
FLAT_UP_TO = 5_000  # vectors
CODES_UP_TO = 400_000  # four times as many as a query takes 7.5 ms for, see docs/performance.md
LINKS = 32  # of a node of the graph; twice as many on its lowest level
LITE = ".db"  # the ending of a Milvus Lite file
SCHEMES = ("http", "https", "tcp", "unix")  # of Milvus

Ranked = tuple[np.ndarray, np.ndarray]  # scores and ids, (Q, k) each, best first


# Functions of (place, dim, threads, collection, token), see `open_vectors`
_INDEXES = {
    "memory": "crosstill.search.memory_vectors:open_index",
    "milvus": "crosstill.search.milvus_vectors:open_index",
}
INDEXES = plugins.Kind("crosstill.search.vectors", "vector index", _INDEXES)


class VectorIndex(Protocol):
    """Unit vectors of one dimension D under ids of 0 or more, found by inner product.

    Vectors are float32 and finite, ids int64. Rows that are not are refused with a `DataError`,
    rows of another D with a `MismatchError`.
    """

    dim: int

    def __len__(self) -> int:
        """Return how many vectors there are."""

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Put vectors (N, D) under ids (N,), in place of what was there.

        Of an id that comes twice, the last row counts.
        """

    def remove(self, ids: np.ndarray) -> None:
        """Take out these ids (N,); those that are not there are ignored."""

    def search(self, queries: np.ndarray, k: int) -> Ranked:
        """Find the k vectors of the largest inner product with each query (Q, D).

        Returns:
            Scores (Q, k) float32 and ids (Q, k) int64, best first; of equal scores the lower id
            first. Beyond the last vector, -inf and -1.

        Raises:
            ConfigError: k is less than 1.
        """

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the vectors (N, D) of these ids (N,).

        Raises:
            KeyError: an id that is not there.
        """

    def ids(self) -> np.ndarray:
        """Return all ids (N,), ascending."""

    def save(self, folder: Path) -> list[str]:
        """Write the index to an existing folder; return the names of the files written."""

    def close(self) -> None:
        """Close connections. Use nothing of the index afterwards."""


def open_vectors(
    place: Path | str,
    dim: int,
    threads: int = 1,
    collection: str = "crosstill",
    token: str | None = None,
) -> VectorIndex:
    """Open vectors where they are.

    Args:
        place: a folder that `MemoryVectors.save` wrote to; or Milvus: the URI of a cluster or the
            path of a Milvus Lite file, which ends in ".db"; or NAME://... of another kind.
        dim: D.
        threads: of one call, at most.
        collection: the name in Milvus; it is made where there is none.
        token: "user:password" or an API key, for Milvus.

    Raises:
        MismatchError: the vectors there have another D.
        CorruptError: a file is missing or damaged.
        ConfigError: Milvus does not answer, or a library is not installed.
    """
    index: VectorIndex = INDEXES.find(_kind_at(place))(place, dim, threads, collection, token)
    return index


def is_server(place: Path | str) -> bool:
    """Tell whether vectors live at a place of their own, not in an index's folder."""
    return _kind_at(place) != "memory"


def is_address(place: str) -> bool:
    """Tell whether a place is the URI of a Milvus cluster."""
    return place.partition(":")[0] in SCHEMES


def _kind_at(place: Path | str) -> str:
    if str(place).endswith(LITE) or is_address(str(place)):
        return "milvus"
    scheme, separator, _ = str(place).partition("://")
    return scheme if separator and scheme in INDEXES.names() else "memory"


def kind_for(count: int) -> Literal["flat", "codes", "hnsw"]:
    """Choose the kind of index in memory for so many vectors."""
    if count <= FLAT_UP_TO:
        return "flat"
    return "codes" if count <= CODES_UP_TO else "hnsw"


def estimate_disk(count: int, dim: int, kind: str) -> int:
    """Estimate the bytes of an index on the disk: what it holds in memory, and its exact rows."""
    rows = count * 4 * dim if kind in ("codes", "hnsw") else 0
    return estimate_bytes(count, dim, kind) + rows


def estimate_bytes(count: int, dim: int, kind: str) -> int:
    """Estimate the memory that an index of so many vectors takes, in bytes, before it is built.

    While an index grows, it takes up to twice that for moments.

    Args:
        count: of vectors.
        dim: D.
        kind: "flat", "codes", "hnsw", or "milvus": then of the float32 vectors and ids there.
    """
    if kind == "milvus":
        return count * (4 * dim + 8)
    if kind not in KINDS:
        raise unknown("kind of index", kind, (*KINDS, "milvus"))
    ids = 3 * 8  # the id of a position, and both halves of the way back
    if kind == "flat":
        return count * (4 * dim + ids)
    rows = 8  # the place of a position's row
    if kind == "codes":
        return count * (dim + ids + rows)
    above = LINKS / (LINKS - 1)  # what one node of the lowest level costs on all others
    return count * int(dim + 4 * (2 * LINKS + above) + 8 + 4 + ids + rows)


# --- checks and ranking, for every kind of index ---


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
