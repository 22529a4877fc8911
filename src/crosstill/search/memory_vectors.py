"""Vectors in the memory of this process, saved as files.

    flat    exact inner products of float32 vectors, by FAISS; up to `FLAT_UP_TO` of them
    codes   codes of 8 bits a dimension, all of them looked at: a quarter of the memory, and a
            fraction of the time; up to `CODES_UP_TO`
    hnsw    a graph over such codes, by FAISS: answers that hardly slow down as the index grows, at
            the price of a few neighbours missed

The last two keep the rows themselves on the disk. Their best candidates by code are ranked anew by
their exact scores, which are the scores that are given. Graphs saved before had no rows; they go
on without until they are built anew.

An array of ids is kept beside the vectors, one a position. A removed row stays at its position
under no id and is left out of searches; when more than a fifth of the rows are like that, the
index drops them: a graph cannot forget a node, so that an `hnsw` index is then built anew.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from crosstill import artefacts, files
from crosstill.errors import ConfigError, CorruptError, MismatchError, unknown
from crosstill.search import vector_index
from crosstill.search.rows import Rows

DEAD = 0.2  # share of removed rows at which an index drops them
FORMAT = 1
RECORD, IDS, ROWS = "vectors.json", "vectors.npy", "rows.npy"
FILES = ("vectors.faiss", "codes.npy", IDS, ROWS)  # of which each kind has its own
NAMES = (RECORD, *FILES)
CANDIDATES = {"codes": 256, "hnsw": 128}  # by code, that are ranked by their rows, at least
# Classes of (dim, threads)
_STORES = {
    "flat": "crosstill.search.faiss_stores:Flat",
    "codes": "crosstill.search.codes:Codes",
    "hnsw": "crosstill.search.faiss_stores:Graph",
}


class Store(Protocol):
    """Vectors by position, searched as the kind of index does it.

    `search` and `vectors` may run in many threads at once, all else only alone.

    Attributes:
        file: the name of its file.
        scale: what its file does not say and `read` needs; None where there is nothing.
    """

    file: str
    scale: float | None

    def add(self, vectors: np.ndarray) -> None:
        """Add vectors (n, D) behind the others."""

    def hide(self, live: np.ndarray | None) -> None:
        """Leave positions out of searches: (N,) bool, False there; None for none."""

    def keep(self, places: np.ndarray) -> None:
        """Forget all but these, which move up; nothing is hidden then."""

    def search(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
        """Find the best positions of each query: scores and positions (Q, wide), best first.

        There are at least so many that are not hidden.
        """

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """Return vectors (n, D), as exact as it keeps them."""

    def write(self, path: Path) -> None:
        """Write them to a file."""

    def read(self, path: Path, count: int, scale: float | None) -> None:
        """Read what `write` wrote.

        Raises:
            CorruptError: it is not the file of so many vectors.
        """


class _Record(artefacts.Record):
    """`vectors.json`."""

    kind: Literal["flat", "codes", "hnsw"]
    dim: int = Field(ge=1, le=65_536)
    files: dict[Literal[FILES], artefacts.Sha256]  # type: ignore[valid-type]
    scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class MemoryVectors:
    """A `VectorIndex` in memory, saved as files: save each time to a folder of its own.

    `search`, `vectors` and `ids` may run in many threads at once, `add` and `remove` only alone.
    """

    def __init__(
        self, dim: int, kind: str = "flat", threads: int = 1, scratch: Path | None = None
    ) -> None:
        """Make an empty index.

        Args:
            dim: D, of unit vectors.
            kind: "flat", "codes" or "hnsw". The first rows added to the last two set the range
                that codes span, with some room: let them be a thousand or more, mixed, where there
                are.
            threads: of one call, at most; other code of the process keeps its own number.
            scratch: the folder where added rows wait until they are saved; None for the system's.

        Raises:
            ConfigError: a value that cannot work, or a library is not installed.
        """
        if kind not in vector_index.KINDS:
            raise unknown("kind of index", kind, vector_index.KINDS)
        if dim < 1 or threads < 1:
            raise ConfigError(f"an index of {dim} dimensions on {threads} threads is not possible")
        self.dim, self.kind, self.threads = dim, kind, threads
        module, _, name = _STORES[kind].partition(":")
        self._store: Store = getattr(import_module(module), name)(dim, threads)
        self._rows = Rows(dim, scratch) if kind in CANDIDATES else None
        self._ids = np.empty(0, np.int64)  # of each position, NO_ROW where it was removed
        self._settle()

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> MemoryVectors:
        """Load the files that `save` wrote.

        Raises:
            CorruptError: a file is missing, cut or changed; the message names it.
            ConfigError: a library is not installed.
        """
        if not artefacts.member(folder, RECORD).is_file():
            raise CorruptError(f"{folder / RECORD}: the file is missing; make the index anew")
        record = artefacts.read(folder / RECORD, _Record, {FORMAT})
        artefacts.check_files(folder, record.files)
        index = cls(record.dim, record.kind, threads)
        needed = {IDS, index._store.file} | ({ROWS} if record.kind == "codes" else set())
        if lacking := needed - record.files.keys():
            raise CorruptError(f"{folder / RECORD}: names no {min(lacking)}; make the index anew")
        index._ids = artefacts.array(folder / IDS, "i", 1).astype(np.int64)
        count = len(index._ids)
        index._store.read(folder / index._store.file, count, record.scale)
        index._rows = Rows.open(folder / ROWS, record.dim, count) if ROWS in record.files else None
        index._settle()
        return index

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        ids, vectors = vector_index.checked_rows(ids, vectors, self.dim)
        if not len(ids):
            return
        places = self._positions(ids)
        self._store.add(vectors)
        if self._rows is not None:
            self._rows.append(vectors)
        self._ids[places[places >= 0]] = vector_index.NO_ROW
        self._ids = np.concatenate([self._ids, ids])
        self._settle()

    def remove(self, ids: np.ndarray) -> None:
        places = self._positions(vector_index.checked_ids(ids))
        self._ids[places[places >= 0]] = vector_index.NO_ROW
        self._settle()

    def search(self, queries: np.ndarray, k: int) -> vector_index.Ranked:
        queries, k = vector_index.checked_vectors(queries, self.dim), vector_index.checked_k(k)
        return vector_index.ranked(partial(self._find, queries), k, len(self))

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        ids = vector_index.checked_ids(ids)
        places = self._positions(ids)
        if (places < 0).any():
            raise KeyError(int(ids[places < 0][0]))
        if not len(places):
            return np.empty((0, self.dim), np.float32)
        return self._store.vectors(places) if self._rows is None else self._rows.take(places)

    def ids(self) -> np.ndarray:
        return self._sorted.copy()

    def save(self, folder: Path) -> list[str]:
        if self.kind != "hnsw":
            self._drop()
        names = [self._store.file, IDS]
        files.write_atomic(folder / self._store.file, self._store.write)
        files.write_atomic(folder / IDS, lambda new: files.save_array(new, self._ids))
        if self._rows is not None:
            names.append(ROWS)
            files.write_atomic(folder / ROWS, self._rows.write)
        record: dict[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "dim": self.dim,
            "files": artefacts.digests(folder, names),
        }
        if self._store.scale is not None:
            record["scale"] = self._store.scale
        files.write_json(folder / RECORD, files.sealed(record))
        return [RECORD, *names]

    def close(self) -> None:
        """Do nothing: the memory goes with the last reference, searches under way finish."""

    def _find(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
        """Find the best `wide` live rows of each query (Q, D): scores and ids, best first."""
        if not wide or not len(queries):
            nothing = (len(queries), wide)
            return np.empty(nothing, np.float32), np.empty(nothing, np.int64)
        if self._rows is None:
            scores, places = self._store.search(queries, wide)
        else:
            most = min(max(2 * wide, CANDIDATES[self.kind]), len(self))
            places = self._store.search(queries, most)[1]
            scores, places = _reranked(self._rows, queries, places, wide)
        return scores, self._ids[places]

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """Return the position of each id, -1 where it is not in the index."""
        if not len(self._sorted):
            return np.full(len(ids), -1)
        at = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[at] == ids, self._sorted_places[at], -1)

    def _settle(self) -> None:
        """Bring everything derived from the ids up to date, and drop dead rows if many."""
        live = self._ids != vector_index.NO_ROW
        places = np.flatnonzero(live)
        order = np.argsort(self._ids[places], kind="stable")
        self._sorted_places = places[order]
        self._sorted = self._ids[self._sorted_places]
        dead = len(self._ids) - len(places)
        self._store.hide(live if dead else None)
        if dead > DEAD * len(self._ids):
            self._drop()

    def _drop(self) -> None:
        """Take the removed rows out."""
        live = np.flatnonzero(self._ids != vector_index.NO_ROW)
        if len(live) == len(self._ids):
            return
        self._store.keep(live)
        if self._rows is not None:
            self._rows.keep(live)
        self._ids = self._ids[live]
        self._settle()


def open_index(
    place: Path | str, dim: int, threads: int, collection: str, token: str | None
) -> MemoryVectors:
    """Open the files in a folder: see `vector_index.open_vectors`."""
    index = MemoryVectors.load(Path(place), threads)
    if index.dim != dim:
        raise MismatchError(
            f"{place}: vectors of {index.dim} dimensions, and a model of {dim}; make the index anew"
        )
    return index


def _reranked(
    rows: Rows, queries: np.ndarray, places: np.ndarray, wide: int
) -> vector_index.Ranked:
    """Rank candidates (Q, n) of each query by their exact scores; return the best `wide`."""
    every, where = np.unique(places, return_inverse=True)
    vectors, where = rows.take(every), where.reshape(places.shape)
    scores = np.stack(
        [np.einsum("nd,d->n", vectors[own], q) for own, q in zip(where, queries, strict=True)]
    )
    order = np.argsort(-scores, axis=1, kind="stable")[:, :wide]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
