"""Checks of FAISS files before FAISS reads them, since a stranger may have made them.

FAISS knows some hundred kinds of index. Some of them name other files, which it opens for writing,
and it believes sizes and links between vectors without looking. Only the two kinds that
`faiss_vectors` writes are let through, and only where every size and every link in them fits.
"""

import mmap
import struct
from pathlib import Path

import numpy as np

from crosstill.errors import CorruptError

FLAT, HNSW, CODES = b"IxFI", b"IHNs", b"IxSQ"
EIGHT_BITS = 0  # faiss.ScalarQuantizer.QT_8bit
DEEPEST = 64  # levels of a graph; one of 10^12 vectors has 9
WIDEST = 1_000_000  # candidates that a file may ask for in each search


def check(path: Path, kind: str, dim: int, count: int) -> None:
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
            reader = _Reader(data)
            try:
                _check_flat(reader, dim, count) if kind == "flat" else _check_graph(
                    reader, dim, count
                )
                reader.expect("length", reader.at, len(data))
            finally:
                reader.close()
    except (ValueError, struct.error) as error:
        raise CorruptError(
            f"{path}: not a {kind} index of {count} vectors as crosstill writes it ({error}); "
            "make the index anew"
        ) from None


class _Reader:
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
        told_dim, told_count, _, _, trained, metric = self.fields("iqqq?i")
        self.expect("dimension", told_dim, dim)
        self.expect("vectors", told_count, count)
        self.expect("trained", trained or not count, True)
        self.expect("metric", metric, 0)  # inner product

    def _room(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise ValueError("cut short")


def _check_flat(reader: _Reader, dim: int, count: int) -> None:
    reader.header(FLAT, dim, count)
    reader.skip("values", count * dim, 4, unit=4)


def _check_graph(reader: _Reader, dim: int, count: int) -> None:
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


def _check_codes(reader: _Reader, dim: int, count: int) -> None:
    reader.header(CODES, dim, count)
    kind, _, _, told_dim, size = reader.fields("iifQQ")
    reader.expect("codes", (kind, told_dim, size), (EIGHT_BITS, dim, dim))
    trained = reader.vector("ranges", np.float32, 2 * dim)
    reader.expect("ranges", len(trained), 2 * dim if count else len(trained))
    if not np.isfinite(trained).all():
        raise ValueError("impossible ranges")
    reader.skip("codes", count * dim, 1)
