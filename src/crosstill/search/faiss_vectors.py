"""Vectors in the memory of this process, through FAISS.

    flat    exact inner products of float32 vectors; up to `FLAT_UP_TO` of them
    hnsw    a graph over codes of 8 bits a dimension: a third of the memory, and answers that
            hardly slow down as the index grows, at the price of a few neighbours missed

Both keep an array of ids beside FAISS, one a position. A removed row stays at its position
under no id and is left out of searches; when more than a fifth of the rows are like that, the
index drops them: a graph cannot forget a node, so that an `hnsw` index is then built anew from
its own codes.

A stranger may have made the files, so they are checked before FAISS reads them. FAISS knows some
hundred kinds of index. Some of them name other files, which it opens for writing, and it believes
sizes and links between vectors without looking. Only the two kinds that are written here are let
through, and only where every size and every link in them fits.
"""

from __future__ import annotations

import logging
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from crosstill import artefacts, files
from crosstill.errors import ConfigError, CorruptError, MismatchError, unknown
from crosstill.search import vector_index

log = logging.getLogger(__name__)

BUILD_WIDTH, SEARCH_WIDTH = 200, 256  # candidates kept while a node is placed, and in a search
FAIR = 1_000  # vectors that tell the range of those to come
DEAD = 0.2  # share of removed rows at which an index drops them
FORMAT = 1
NAMES = RECORD, INDEX, IDS = "vectors.json", "vectors.faiss", "vectors.npy"
BLOCK = 1 << 20  # bytes read or written at a time
ROWS = 10_000  # decoded at a time when a graph is built anew
FLAT, HNSW, CODES = b"IxFI", b"IHNs", b"IxSQ"
EIGHT_BITS = 0  # faiss.ScalarQuantizer.QT_8bit
DEEPEST = 64  # levels of a graph; one of 10^12 vectors has 9
WIDEST = 1_000_000  # candidates that a file may ask for in each search


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
        if kind not in vector_index.KINDS:
            raise unknown("kind of index", kind, vector_index.KINDS)
        if dim < 1 or threads < 1:
            raise ConfigError(f"an index of {dim} dimensions on {threads} threads is not possible")
        self.dim, self.kind, self.threads = dim, kind, threads
        self._faiss = vector_index.needed("faiss", "search")
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
        _check_file(folder / INDEX, record.kind, record.dim, len(index._ids))
        index._index = _read(index._faiss, folder / INDEX)
        index._settle()
        return index

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        ids, vectors = vector_index.checked_rows(ids, vectors, self.dim)
        if not len(ids):
            return
        places = self._positions(ids)
        with self._limited():
            if not self._index.is_trained:
                self._index.train(_range(vectors))
            self._index.add(vectors)
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
        rows: np.ndarray = self._index.reconstruct_batch(places)
        return rows

    def ids(self) -> np.ndarray:
        return self._sorted.copy()

    def save(self, folder: Path) -> list[str]:
        if self.kind == "flat":
            self._drop()
        files.write_atomic(folder / INDEX, partial(_write, self._faiss, self._index))
        files.write_atomic(folder / IDS, lambda new: files.save_array(new, self._ids))
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

    def _find(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
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
        live = self._ids != vector_index.NO_ROW
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
        live = np.flatnonzero(self._ids != vector_index.NO_ROW)
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
        index = self._faiss.IndexHNSWSQ(self.dim, codes, vector_index.LINKS, metric)
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


def _read(faiss: Any, path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return faiss.read_index(faiss.PyCallbackIOReader(file.read, BLOCK))
        except RuntimeError:
            raise CorruptError(
                f"{path}: this version of FAISS ({faiss.__version__}) cannot read it; "
                "make the index anew"
            ) from None


def _check_file(path: Path, kind: str, dim: int, count: int) -> None:
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
