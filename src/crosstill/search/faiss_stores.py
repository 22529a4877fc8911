"""Vectors that FAISS searches: all of them exactly, or along a graph over codes of 8 bits.

A stranger may have made the files, so they are checked before FAISS reads them. FAISS knows some
hundred kinds of index. Some of them name other files, which it opens for writing, and it believes
sizes and links between vectors without looking. Only the two kinds that are written here are let
through, and only where every size and every link in them fits.
"""

from __future__ import annotations

import logging
import mmap
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import extras
from crosstill.errors import CorruptError
from crosstill.search import vector_index

log = logging.getLogger(__name__)

BUILD_WIDTH, SEARCH_WIDTH = 200, 256  # candidates kept while a node is placed, and in a search
FAIR = 1_000  # vectors that tell the range of those to come
BLOCK = 1 << 20  # bytes read or written at a time
DECODED = 10_000  # rows, at a time, when a graph is built anew
FLAT, HNSW, CODES = b"IxFI", b"IHNs", b"IxSQ"
EIGHT_BITS = 0  # faiss.ScalarQuantizer.QT_8bit
DEEPEST = 64  # levels of a graph; one of 10^12 vectors has 9
WIDEST = 1_000_000  # candidates that a file may ask for in each search


class _Faiss(ABC):
    """A `Store` of `memory_vectors` around one FAISS index.

    Args:
        dim: D.
        threads: of one call, at most.
    """

    file = "vectors.faiss"
    scale = None
    kind: str

    def __init__(self, dim: int, threads: int) -> None:
        self.dim, self._threads = dim, threads
        self._faiss = extras.load("this index", "search", "faiss")
        # From four queries on a matrix product is faster (16 x 100,000 x 512: 1.8 ms a query, not
        # 7.8). FAISS compares queries x dim with this number, which is one for the whole process.
        self._faiss.cvar.distance_compute_blas_threshold = 4 * dim
        self._index = self._empty()
        self._selector: Any = None

    def add(self, vectors: np.ndarray) -> None:
        with self._limited():
            if not self._index.is_trained:
                self._index.train(_range(vectors))
            self._index.add(vectors)

    def hide(self, live: np.ndarray | None) -> None:
        self._selector = None
        if live is not None:
            self._selector = self._faiss.IDSelectorBitmap(np.packbits(live, bitorder="little"))

    def vectors(self, places: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self._index.reconstruct_batch(places)
        return rows

    def write(self, path: Path) -> None:
        with path.open("wb") as file:  # FAISS's own writer refuses some names and hides its reasons
            self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(file.write, BLOCK))

    def read(self, path: Path, count: int, scale: float | None) -> None:
        check_file(path, self.kind, self.dim, count)
        with path.open("rb") as file:
            try:
                self._index = self._faiss.read_index(
                    self._faiss.PyCallbackIOReader(file.read, BLOCK)
                )
            except RuntimeError:
                raise CorruptError(
                    f"{path}: this version of FAISS ({self._faiss.__version__}) cannot read it; "
                    "make the index anew"
                ) from None

    @abstractmethod
    def _empty(self) -> Any: ...

    def _selection(self) -> Any:
        return self._faiss.SearchParameters(sel=self._selector) if self._selector else None

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Let FAISS use `threads`. OpenMP keeps that number for each calling thread apart."""
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(self._threads)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)


class Flat(_Faiss):
    """Exact inner products of float32 vectors."""

    kind = "flat"

    def keep(self, places: np.ndarray) -> None:
        with self._limited():
            kept = np.zeros(self._index.ntotal, bool)
            kept[places] = True
            bits = self._faiss.IDSelectorBitmap(np.packbits(~kept, bitorder="little"))
            self._index.remove_ids(bits)
        self._selector = None

    def search(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
        with self._limited():
            scores, places = self._index.search(queries, wide, params=self._selection())
        return scores, places

    def _empty(self) -> Any:
        return self._faiss.IndexFlatIP(self.dim)


class Graph(_Faiss):
    """A graph (HNSW) over codes of 8 bits, each dimension with a range of its own."""

    kind = "hnsw"

    def keep(self, places: np.ndarray) -> None:
        log.info("building the graph of %d vectors anew", len(places))
        with self._limited():
            self._index = self._rebuilt(places)
        self._selector = None

    def search(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
        with self._limited():
            scores, places = self._index.search(queries, wide, params=self._parameters(wide))
            short = (places < 0).any(axis=1)
            if short.any():  # the graph leads to too few live rows: look at every one
                every = self._faiss.downcast_index(self._index.storage)
                hits = every.search(queries[short], wide, params=self._selection())
                scores[short], places[short] = hits
        return scores, places

    def _empty(self) -> Any:
        codes, metric = self._faiss.ScalarQuantizer.QT_8bit, self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.IndexHNSWSQ(self.dim, codes, vector_index.LINKS, metric)
        index.hnsw.efConstruction = BUILD_WIDTH
        return index

    def _parameters(self, wide: int) -> Any:
        select = {"sel": self._selector} if self._selector else {}
        return self._faiss.SearchParametersHNSW(efSearch=max(SEARCH_WIDTH, 2 * wide), **select)

    def _rebuilt(self, places: np.ndarray) -> Any:
        """Build a graph of the rows at these positions; their codes stay as they are."""
        index = self._empty()
        codec = self._faiss.downcast_index(self._index.storage).sq
        low, span = self._faiss.vector_to_array(codec.trained).reshape(2, self.dim)
        index.train(np.stack([low, low + span]))
        for start in range(0, len(places), DECODED):
            index.add(self._index.reconstruct_batch(places[start : start + DECODED]))
        return index


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


def check_file(path: Path, kind: str, dim: int, count: int) -> None:
    """Refuse a file that is not an index of this kind, dimension and number of vectors.

    Args:
        path: the file.
        kind: "flat" or "hnsw".
        dim: D.
        count: of vectors.

    Raises:
        CorruptError: it is not; the message says where it differs.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Fields(data)
            try:
                if kind == "flat":
                    reader.header(FLAT, dim, count)
                    reader.skip("values", count * dim, 4, unit=4)
                else:
                    _check_graph(reader, dim, count)
                reader.expect("length", reader.at, len(data))
            finally:
                reader.close()
    except (ValueError, struct.error) as error:
        raise CorruptError(
            f"{path}: not a {kind} index of {count} vectors as crosstill writes it ({error}); "
            "make the index anew"
        ) from None


class _Fields:
    """Walks over the fields of a FAISS file: little-endian, without gaps."""

    def __init__(self, data: mmap.mmap) -> None:
        self.at, self._data = 0, memoryview(data)

    def close(self) -> None:
        self._data.release()

    def fields(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def skip(self, name: str, count: int, size: int, unit: int = 1) -> None:
        """Pass a vector that must have `count` entries of `size` bytes, in units of `unit`."""
        (length,) = self.fields("Q")
        self.expect(name, length * unit, count * size)
        self._room(count * size)
        self.at += count * size

    def vector(self, name: str, kind: type[np.generic], most: int) -> np.ndarray:
        """Return a copy of a vector of at most so many entries."""
        (length,) = self.fields("Q")
        if length > most:
            raise ValueError(f"{length} {name}, {most} at most")
        size = length * np.dtype(kind).itemsize
        self._room(size)
        out = np.frombuffer(self._data[self.at : self.at + size], kind).copy()
        self.at += size
        return out

    def expect(self, name: str, value: object, wanted: object) -> None:
        if value != wanted:
            raise ValueError(f"{name} {value!r}, not {wanted!r}")

    def header(self, kind: bytes, dim: int, count: int) -> None:
        """Pass what every index begins with."""
        self.expect("kind", self.fields("4s")[0], kind)
        file_dim, file_count, _, _, trained, metric = self.fields("iqqq?i")
        self.expect("dimension", file_dim, dim)
        self.expect("vectors", file_count, count)
        self.expect("trained", trained or not count, True)
        self.expect("metric", metric, 0)  # inner product

    def _room(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise ValueError("cut short")


def _check_graph(reader: _Fields, dim: int, count: int) -> None:
    reader.header(HNSW, dim, count)
    probabilities = reader.vector("probabilities", np.float64, DEEPEST)
    widths = reader.vector("widths of levels", np.int32, DEEPEST + 1)
    levels = reader.vector("levels", np.int32, count)
    offsets = reader.vector("offsets", np.uint64, count + 1)
    neighbours = reader.vector("links", np.int32, 1 << 40)
    entry, deepest, building, searching, _ = reader.fields("5i")
    reader.expect("levels", len(levels), count)
    reader.expect("offsets", len(offsets), count + 1)
    reader.expect("widths of levels", len(widths), len(probabilities) + 1)
    sound = {
        "widths of levels": widths[0] == 0 and (np.diff(widths) > 0).all(),
        "levels": not count or (levels.min() >= 1 and levels.max() < len(widths)),
        "entry": entry == -1 if not count else 0 <= entry < count,
        "links": not len(neighbours) or (neighbours.min() >= -1 and neighbours.max() < count),
        "widths of searches": 0 < building <= WIDEST and 0 < searching <= WIDEST,
    }
    for name in (name for name, holds in sound.items() if not holds):
        raise ValueError(f"impossible {name}")
    if count:
        spans = np.concatenate([[0], widths[levels].astype(np.uint64).cumsum()])
        reader.expect("offsets", bool((spans == offsets).all()), True)
        reader.expect("deepest level", deepest, int(levels[entry]) - 1)
        reader.expect("deepest level", deepest, int(levels.max()) - 1)
        _check_levels(widths, levels, offsets, neighbours)
    reader.expect("links", len(neighbours), int(offsets[-1]))
    _check_codes(reader, dim, count)


def _check_levels(
    widths: np.ndarray, levels: np.ndarray, offsets: np.ndarray, neighbours: np.ndarray
) -> None:
    """Refuse a link on a level that leads to a node without this level."""
    for level in range(1, int(levels.max())):
        nodes = np.flatnonzero(levels > level)
        starts = offsets[nodes].astype(np.int64) + widths[level]
        links = neighbours[starts[:, None] + np.arange(widths[level + 1] - widths[level])]
        if (levels[links[links >= 0]] <= level).any():
            raise ValueError("impossible links")


def _check_codes(reader: _Fields, dim: int, count: int) -> None:
    reader.header(CODES, dim, count)
    kind, _, _, file_dim, size = reader.fields("iifQQ")
    reader.expect("codes", (kind, file_dim, size), (EIGHT_BITS, dim, dim))
    trained = reader.vector("ranges", np.float32, 2 * dim)
    reader.expect("ranges", len(trained), 2 * dim if count else len(trained))
    if not np.isfinite(trained).all():
        raise ValueError("impossible ranges")
    reader.skip("codes", count * dim, 1)
