"""Codes of 8 bits a dimension, all of them looked at, by integer products of ONNX Runtime.

A coordinate x is kept as round(x / scale) + 128, with one scale for all. A query is rounded to 7
bits, each by a scale of its own, so that no processor's sums of products overflow. Integer products
of a hundred thousand codes take a fraction of the time of float32 ones, and those of sixteen
queries hardly more than those of one. They order the rows nearly as the vectors do; what they find
is ranked anew by the exact rows: see `memory_vectors`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import artefacts, extras, files
from crosstill.errors import CorruptError
from crosstill.search import vector_index

ZERO, FINEST = 128, 127  # the code of 0, and the largest step away from it
QUERY_FINEST = 63
ROOM = 1.25  # beyond the largest coordinate of the first vectors, for those that come later
FAIR = 1_000  # vectors that tell the range of those to come
TOGETHER = 16  # queries
# scores (N, Q) int32 = codes (N, D) uint8 @ queries (D, Q) int8: the one operator of a model as
# `onnx.helper` makes it, written out because searching does not need the package onnx
PRODUCT = (
    b"\x08\x05:\x83\x01\n'\n\x05codes\n\x07queries\x12\x06scores\"\rMatMulInteger\x12\x04scan"
    b"Z\x19\n\x05codes\x12\x10\n\x0e\x08\x02\x12\n\n\x03\x12\x01N\n\x03\x12\x01D"
    b"Z\x1b\n\x07queries\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01D\n\x03\x12\x01Q"
    b"b\x1a\n\x06scores\x12\x10\n\x0e\x08\x06\x12\n\n\x03\x12\x01N\n\x03\x12\x01QB\x04\n\x00\x10\n"
)


class Codes:
    """A `Store` of `memory_vectors`.

    Args:
        dim: D.
        threads: of one search.
    """

    file = "codes.npy"

    def __init__(self, dim: int, threads: int) -> None:
        self.dim = dim
        self.scale: float | None = None
        self._parts = [np.empty((0, dim), np.uint8)]
        self._dead: np.ndarray | None = None  # positions
        self._session = _session(threads)

    def add(self, vectors: np.ndarray) -> None:
        if self.scale is None:
            self.scale = _choose_scale(vectors)
        steps = np.rint(vectors / np.float32(self.scale)).clip(-FINEST, FINEST)
        self._parts.append((steps + ZERO).astype(np.uint8))

    def hide(self, live: np.ndarray | None) -> None:
        self._dead = None if live is None else np.flatnonzero(~live)

    def keep(self, places: np.ndarray) -> None:
        self._parts, self._dead = [self._codes()[places]], None

    def search(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
        codes, dead = self._codes(), self._dead
        found = [
            self._some(codes, dead, queries[start : start + TOGETHER], wide)
            for start in range(0, len(queries), TOGETHER)
        ]
        scores, places = (np.concatenate(side) for side in zip(*found, strict=True))
        return scores, places

    def vectors(self, places: np.ndarray) -> np.ndarray:
        steps = self._codes()[places].astype(np.float32) - ZERO
        return steps * np.float32(self.scale or 0)

    def write(self, path: Path) -> None:
        files.save_array(path, self._codes())

    def read(self, path: Path, count: int, scale: float | None) -> None:
        codes = artefacts.array(path, "u", 2)
        if codes.shape != (count, self.dim) or codes.dtype != np.uint8 or (count and not scale):
            raise CorruptError(
                f"{path}: not the codes of {count} vectors as crosstill writes them "
                f"({codes.dtype} of shape {codes.shape}); make the index anew"
            )
        self._parts, self.scale = [codes], scale

    def _codes(self) -> np.ndarray:
        """Return all codes (N, D), in one piece of memory from now on."""
        parts = self._parts
        if len(parts) > 1:
            self._parts = parts = [np.concatenate(parts)]
        return parts[0]

    def _some(
        self, codes: np.ndarray, dead: np.ndarray | None, queries: np.ndarray, wide: int
    ) -> vector_index.Ranked:
        largest = np.abs(queries).max(axis=1, keepdims=True).clip(np.finfo(np.float32).tiny)
        steps = np.rint(queries * (QUERY_FINEST / largest)).astype(np.int8)
        (products,) = self._session.run(
            None, {"codes": codes, "queries": np.ascontiguousarray(steps.T)}
        )
        scores = np.ascontiguousarray(products.T)
        if dead is not None:
            scores[:, dead] = np.iinfo(np.int32).min
        best = np.argpartition(scores, -wide, axis=1)[:, -wide:]
        scores = np.take_along_axis(scores, best, axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")
        return (
            np.take_along_axis(scores, order, 1).astype(np.float32),
            np.take_along_axis(best, order, 1),
        )


def _choose_scale(vectors: np.ndarray) -> float:
    """Choose the size of a step from the first vectors; what lies outside of the range is cut off.

    It reaches a quarter beyond their largest coordinate, and at least four standard deviations of a
    unit vector's, eight where there are few vectors to go by.
    """
    least = (4 if len(vectors) >= FAIR else 8) / vectors.shape[1] ** 0.5
    return float(max(ROOM * float(np.abs(vectors).max()), least) / FINEST)


@lru_cache(maxsize=8)
def _session(threads: int) -> Any:
    onnxruntime = extras.load("this index", "search", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
