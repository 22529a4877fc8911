"""Vectors in the memory of this process, through FAISS.

    flat    exact inner products of float32 vectors; up to `FLAT_UP_TO` of them
    hnsw    a graph over codes of 8 bits a dimension: a third of the memory, and answers that
            hardly slow down as the index grows, at the price of a few neighbours missed

Both keep an array of ids beside FAISS, one a position. A removed row stays at its position
under no id and is left out of searches; when more than a fifth of the rows are like that, the
index drops them: a graph cannot forget a node, so that an `hnsw` index is then built anew from
its own codes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from crosstill import artefacts, files
from crosstill.errors import ConfigError, CorruptError, MismatchError, unknown
from crosstill.search import faiss_files
from crosstill.search.vector_checks import (
    NO_ROW,
    Ranked,
    checked_ids,
    checked_k,
    checked_rows,
    checked_vectors,
    needed,
    ranked,
)

log = logging.getLogger(__name__)

KINDS = ("flat", "hnsw")
FLAT_UP_TO = 200_000  # vectors; a query of so many takes one thread some 30 ms
LINKS = 32  # of a node of the graph; twice as many on its lowest level
BUILD_WIDTH, SEARCH_WIDTH = 200, 256  # candidates kept while a node is placed, and in a search
FAIR = 1_000  # vectors that tell the range of those to come
DEAD = 0.2  # share of removed rows at which an index drops them
FORMAT = 1
NAMES = RECORD, INDEX, IDS = "vectors.json", "vectors.faiss", "vectors.npy"
BLOCK = 1 << 20  # bytes read or written at a time
ROWS = 10_000  # decoded at a time when a graph is built anew


class _Record(artefacts.Record):
    """`vectors.json`."""

    kind: Literal["flat", "hnsw"]
    dim: int = Field(ge=1, le=65_536)
    files: dict[Literal["vectors.faiss", "vectors.npy"], artefacts.Sha256] = Field(min_length=2)


class FaissVectors:
    """A `VectorIndex` in memory, saved as three files: save each time to a folder of its own.

    `search`, `vectors` and `ids` may run in many threads at once, `add` and `remove` only alone.
    """

    def __init__(self, dim: int, kind: str = "flat", threads: int = 1) -> None:
        """Make an empty index.

        Args:
            dim: D, of unit vectors.
            kind: "flat" or "hnsw". The first rows added to "hnsw" set the range that its codes
                span, with some room: let them be a thousand or more, mixed, where there are.
            threads: of one call, at most; other code of the process keeps its own number.

        Raises:
            ConfigError: a value that cannot work, or FAISS is not installed.
        """
        if kind not in KINDS:
            raise unknown("kind of index", kind, KINDS)
        if dim < 1 or threads < 1:
            raise ConfigError(f"an index of {dim} dimensions on {threads} threads is not possible")
        self.dim, self.kind, self.threads = dim, kind, threads
        self._faiss = needed("faiss", "search")
        # From four queries on a matrix product is faster (16 x 100,000 x 512: 1.8 ms a query, not
        # 7.8). FAISS compares queries x dim with this number, which is one for the whole process.
        self._faiss.cvar.distance_compute_blas_threshold = 4 * dim
        self._index = self._empty()
        self._ids = np.empty(0, np.int64)  # of each position, NO_ROW where it was removed
        self._settle()

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> FaissVectors:
        """Load the files that `save` wrote.

        Raises:
            CorruptError: a file is missing, cut or changed; the message names it.
            ConfigError: FAISS is not installed.
        """
        if not artefacts.member(folder, RECORD).is_file():
            raise CorruptError(f"{folder / RECORD}: the file is missing; make the index anew")
        record = artefacts.read(folder / RECORD, _Record, {FORMAT})
        artefacts.check_files(folder, record.files)
        index = cls(record.dim, record.kind, threads)
        index._ids = artefacts.array(folder / IDS, "i", 1).astype(np.int64)
        faiss_files.check(folder / INDEX, record.kind, record.dim, len(index._ids))
        index._index = _read(index._faiss, folder / INDEX)
        index._settle()
        return index

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        ids, vectors = checked_rows(ids, vectors, self.dim)
        if not len(ids):
            return
        places = self._positions(ids)
        with self._limited():
            if not self._index.is_trained:
                self._index.train(_range(vectors))
            self._index.add(vectors)
        self._ids[places[places >= 0]] = NO_ROW
        self._ids = np.concatenate([self._ids, ids])
        self._settle()

    def remove(self, ids: np.ndarray) -> None:
        places = self._positions(checked_ids(ids))
        self._ids[places[places >= 0]] = NO_ROW
        self._settle()

    def search(self, queries: np.ndarray, k: int) -> Ranked:
        queries, k = checked_vectors(queries, self.dim), checked_k(k)
        return ranked(partial(self._find, queries), k, len(self))

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        ids = checked_ids(ids)
        places = self._positions(ids)
        if (places < 0).any():
            raise KeyError(int(ids[places < 0][0]))
        if not len(places):
            return np.empty((0, self.dim), np.float32)
        rows: np.ndarray = self._index.reconstruct_batch(places)
        return rows

    def ids(self) -> np.ndarray:
        return self._sorted.copy()

    def save(self, folder: Path) -> list[str]:
        if self.kind == "flat":
            self._drop()
        files.write_atomic(folder / INDEX, partial(_write, self._faiss, self._index))
        files.write_atomic(folder / IDS, partial(_write_ids, self._ids))
        record = {
            "format": FORMAT,
            "kind": self.kind,
            "dim": self.dim,
            "files": artefacts.digests(folder, [INDEX, IDS]),
        }
        files.write_json(folder / RECORD, files.sealed(record))
        return list(NAMES)

    def close(self) -> None:
        """Do nothing: the memory goes with the last reference, searches under way finish."""

    def _find(self, queries: np.ndarray, wide: int) -> Ranked:
        """Find the best `wide` live rows of each query (Q, D), in FAISS's order."""
        if not wide:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        with self._limited():
            scores, places = self._index.search(queries, wide, params=self._parameters(wide))
            short = (places < 0).any(axis=1)
            if short.any():  # the graph leads to too few live rows: look at every one
                every = self._faiss.downcast_index(self._index.storage)
                hits = every.search(queries[short], wide, params=self._selection())
                scores[short], places[short] = hits
        return scores, self._ids[places]

    def _parameters(self, wide: int) -> Any:
        if self.kind == "flat":
            return self._selection()
        select = {"sel": self._selector} if self._selector else {}
        return self._faiss.SearchParametersHNSW(efSearch=max(SEARCH_WIDTH, 2 * wide), **select)

    def _selection(self) -> Any:
        return self._faiss.SearchParameters(sel=self._selector) if self._selector else None

    def _positions(self, ids: np.ndarray) -> np.ndarray:
        """Return the position of each id, -1 where it is not in the index."""
        if not len(self._sorted):
            return np.full(len(ids), -1)
        at = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[at] == ids, self._sorted_places[at], -1)

    def _settle(self) -> None:
        """Bring everything derived from the ids up to date, and drop dead rows if many."""
        live = self._ids != NO_ROW
        places = np.flatnonzero(live)
        order = np.argsort(self._ids[places], kind="stable")
        self._sorted_places = places[order]
        self._sorted = self._ids[self._sorted_places]
        dead = len(self._ids) - len(places)
        bits = np.packbits(live, bitorder="little")
        self._selector = self._faiss.IDSelectorBitmap(bits) if dead else None
        if dead > DEAD * len(self._ids):
            self._drop()

    def _drop(self) -> None:
        """Take the removed rows out of FAISS."""
        if self._selector is None:
            return
        live = np.flatnonzero(self._ids != NO_ROW)
        with self._limited():
            if self.kind == "flat":
                self._index.remove_ids(self._faiss.IDSelectorNot(self._selector))
            else:
                log.info("building the graph of %d vectors anew", len(live))
                self._index = self._rebuilt_graph(live)
        self._ids = self._ids[live]
        self._settle()

    def _rebuilt_graph(self, places: np.ndarray) -> Any:
        """Build a graph of the rows at these positions; their codes stay as they are."""
        index = self._empty()
        codec = self._faiss.downcast_index(self._index.storage).sq
        low, span = self._faiss.vector_to_array(codec.trained).reshape(2, self.dim)
        index.train(np.stack([low, low + span]))
        for start in range(0, len(places), ROWS):
            index.add(self._index.reconstruct_batch(places[start : start + ROWS]))
        return index

    def _empty(self) -> Any:
        if self.kind == "flat":
            return self._faiss.IndexFlatIP(self.dim)
        codes, metric = self._faiss.ScalarQuantizer.QT_8bit, self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.IndexHNSWSQ(self.dim, codes, LINKS, metric)
        index.hnsw.efConstruction = BUILD_WIDTH
        return index

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Let FAISS use `threads`. OpenMP keeps that number for each calling thread apart."""
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(self.threads)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)


def open_index(
    place: Path | str, dim: int, threads: int, collection: str, token: str | None
) -> FaissVectors:
    """Open the FAISS files in a folder: see `vector_index.open_vectors`."""
    index = FaissVectors.load(Path(place), threads)
    if index.dim != dim:
        raise MismatchError(
            f"{place}: vectors of {index.dim} dimensions, and a model of {dim}; make the index anew"
        )
    return index


def estimate_bytes(count: int, dim: int, kind: str) -> int:
    """Estimate the memory of so many vectors, in bytes; while it grows, up to twice that."""
    ours = 3 * 8  # the id of a position, and both halves of the way back
    if kind == "flat":
        return count * (4 * dim + ours)
    above = LINKS / (LINKS - 1)  # what one node of the lowest level costs on all others
    return count * int(dim + 4 * (2 * LINKS + above) + 8 + 4 + ours)


def _range(vectors: np.ndarray) -> np.ndarray:
    """Choose the lowest and highest value of each dimension (2, D) that a code expresses.

    FAISS cuts off what lies outside. A quarter more than these vectors span, and at least four
    standard deviations of a unit vector's coordinate to each side, leave room for those that come
    later; with few vectors to go by it is eight, which costs one neighbour in a hundred.
    """
    low, high = vectors.min(axis=0), vectors.max(axis=0)
    least = (4 if len(vectors) >= FAIR else 8) / vectors.shape[1] ** 0.5
    reach = np.maximum(0.625 * (high - low), least)
    middle = (low + high) / 2
    return np.stack([middle - reach, middle + reach])


def _write(faiss: Any, index: Any, path: Path) -> None:
    with path.open("wb") as file:  # FAISS's own writer refuses some names and hides why it fails
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, BLOCK))


def _write_ids(ids: np.ndarray, path: Path) -> None:
    files.save_array(path, ids)


def _read(faiss: Any, path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return faiss.read_index(faiss.PyCallbackIOReader(file.read, BLOCK))
        except RuntimeError:
            raise CorruptError(
                f"{path}: this version of FAISS ({faiss.__version__}) cannot read it; "
                "make the index anew"
            ) from None
