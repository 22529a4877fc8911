"""Exact rows for an index that searches by codes: float32, on the disk, read a few at a time.

Rows are read, not mapped: what was read belongs to the system, which lets go of it when memory is
short, and not to this process.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crosstill import artefacts
from crosstill.errors import CorruptError

BLOCK = 8192  # rows that are copied at a time
NO_FILE = -1


class Rows:
    """Vectors (N, D) by position: those of a file, and behind them those added since.

    Added rows wait in a nameless temporary file. `take` may run in many threads at once.

    Args:
        dim: D.
        scratch: the folder of that file; None for the system's.
    """

    def __init__(self, dim: int, scratch: Path | None = None) -> None:
        self.dim, self._scratch = dim, scratch
        self._filed = self._added = NO_FILE
        self._start = self._old = self._new = 0  # bytes before the file's rows; rows of each
        # the row of each position: those of the file are counted before those that were added
        self._at = np.empty(0, np.int64)

    @classmethod
    def open(cls, path: Path, dim: int, count: int) -> Rows:
        """Open the file that `write` wrote; rows that are added wait beside it.

        Raises:
            CorruptError: it is not an array of so many float32 rows.
        """
        values = artefacts.array(path, "f", 2, mmap=True)
        if values.shape != (count, dim) or values.dtype != np.dtype("<f4"):
            raise CorruptError(
                f"{path}: {values.dtype} of shape {values.shape} where float32 of "
                f"{(count, dim)} is needed; make the index anew"
            )
        rows = cls(dim, path.parent)
        rows._filed, rows._old = rows._own(os.open(path, os.O_RDONLY | os.O_CLOEXEC)), count
        rows._start = path.stat().st_size - count * dim * 4
        rows._at = np.arange(count)
        return rows

    def __len__(self) -> int:
        return len(self._at)

    def append(self, vectors: np.ndarray) -> None:
        """Add float32 vectors (n, D) behind the others."""
        if self._added == NO_FILE:
            with tempfile.TemporaryFile(dir=self._scratch) as file:  # without a name: none is left
                self._added = self._own(os.dup(file.fileno()))
        with os.fdopen(self._added, "wb", closefd=False) as file:
            file.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        self._at = np.append(self._at, self._old + self._new + np.arange(len(vectors)))
        self._new += len(vectors)

    def keep(self, positions: np.ndarray) -> None:
        """Forget all rows but these, which move up."""
        self._at = self._at[positions]

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Read rows (n, D)."""
        out = np.empty((len(positions), self.dim), "<f4")
        size = 4 * self.dim
        for buffer, row in zip(out, self._at[positions].tolist(), strict=True):
            new = row - self._old
            file = self._added if new >= 0 else self._filed
            at = new * size if new >= 0 else self._start + row * size
            if os.preadv(file, [buffer.data], at) != size:
                raise CorruptError("rows.npy: the index was cut short while it was in use")
        return out

    def write(self, path: Path) -> None:
        """Write all rows as one .npy file, in the order of their positions."""
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(self), self.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in self._blocks():
                file.write(block.tobytes())

    def _own(self, descriptor: int) -> int:
        """Close a file when the last search is done with these rows."""
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), BLOCK):
            yield self.take(np.arange(start, min(start + BLOCK, len(self))))
