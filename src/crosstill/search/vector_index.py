"""The protocol of an index of vectors, and the kinds that there are.

    faiss_vectors     in the memory of this process, saved as files
    milvus_vectors    a Milvus cluster, or a Milvus Lite file

Neither library is imported before an index of its kind is opened. Another distribution may offer
further kinds: the place NAME://... opens the entry point NAME of the group that `INDEXES` names.
"""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from crosstill import plugins
from crosstill.errors import unknown
from crosstill.search import faiss_vectors
from crosstill.search.faiss_vectors import FLAT_UP_TO
from crosstill.search.milvus_vectors import is_milvus
from crosstill.search.vector_checks import Ranked

# Functions of (place, dim, threads, collection, token), see `open_vectors`
_INDEXES = {
    "faiss": "crosstill.search.faiss_vectors:open_index",
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
        """Return the vectors (N, D) of these ids (N,); of an "hnsw" index, decoded from 8 bits.

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
        place: a folder that `FaissVectors.save` wrote to; or Milvus: the URI of a cluster or the
            path of a Milvus Lite file, which ends in ".db"; or NAME://... of another kind.
        dim: D.
        threads: of one FAISS call, at most.
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
    return _kind_at(place) != "faiss"


def _kind_at(place: Path | str) -> str:
    if is_milvus(place):
        return "milvus"
    scheme, separator, _ = str(place).partition("://")
    return scheme if separator and scheme in INDEXES.names() else "faiss"


def kind_for(count: int) -> Literal["flat", "hnsw"]:
    """Choose the kind of FAISS index for so many vectors."""
    return "flat" if count <= FLAT_UP_TO else "hnsw"


def estimate_bytes(count: int, dim: int, kind: str) -> int:
    """Estimate the memory that an index of so many vectors takes, in bytes, before it is built.

    While a FAISS index grows, it takes up to twice that for moments.

    Args:
        count: of vectors.
        dim: D.
        kind: "flat", "hnsw", or "milvus": then of the float32 vectors and ids on the server.
    """
    if kind == "milvus":
        return count * (4 * dim + 8)
    if kind not in faiss_vectors.KINDS:
        raise unknown("kind of index", kind, (*faiss_vectors.KINDS, "milvus"))
    return faiss_vectors.estimate_bytes(count, dim, kind)
