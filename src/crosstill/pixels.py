"""From a file's bytes to upright RGB and to a model's size, in numpy.

Training, caching, evaluation, indexing and serving all decode here, so that a teacher, its
student and the search box see the same pixels. JPEG is decoded in this process (`jpeg`),
everything else in worker processes (`decoding`) by Pillow (`rasters`). `load` resizes without
torch; `images` does so with it, faster, and the pixels are equal bit for bit. `MAX_PIXELS` and
`MAX_SIDE` are checked before anything is decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import decoding, files, jpeg
from crosstill.errors import ImageError
from crosstill.preprocess import Preprocess
from crosstill.rasters import FORMATS, MAX_PIXELS, MAX_SIDE, OVERSIZE, OVERTIME, check_size
from crosstill.resize import resize

__all__ = [
    "CLASSES",
    "FORMATS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "Quarantine",
    "check_size",
    "decode",
    "failure_class",
    "load",
    "quarantine_row",
    "upright",
]

# what is wrong with a file, by the beginning of the reason
_CLASSES = {
    "empty file": "empty",
    "not an image": "not-an-image",
    "too many": "too-large",
    "larger than": "too-large",
    OVERSIZE: "too-large",
    OVERTIME: "too-slow",
    "truncated": "truncated",
    "corrupt": "damaged",
    "missing": "missing",
    "vanished": "missing",
    "changed": "changed",
    "a link to nothing": "missing",
    "cannot be read (No such file": "missing",
    "no caption": "no-caption",
    "no vector": "no-vector",
    "no image": "empty",
}
CLASSES = tuple(dict.fromkeys([*_CLASSES.values(), "unsupported-format", "unreadable"]))


def decode(data: bytes, path: str) -> np.ndarray:
    """Decode a file to upright RGB: uint8 (H, W, 3).

    Raises:
        ImageError: whatever is wrong with the bytes. The reason is one of "empty file",
            "not an image", "truncated", "too many pixels (W x H)", "too many scans (S of W x H)",
            "corrupt: …", "takes too long to decode", "too much memory" and, of formats known by
            name, "HEIC is not read; convert it …".
    """
    with upright(data, path) as pixels:
        return pixels[..., :3]


def load(data: bytes, path: str, preprocess: Preprocess) -> np.ndarray:
    """Bring a file to the model's size: uint8 (3, H, W), the same pixels as `images.load`.

    Raises:
        ImageError: see `decode`; also for an image too long for its resized form.
    """
    with upright(data, path) as pixels:
        height, width = preprocess.sides(*pixels.shape[:2])
        check_size(width, height, path)
        resized = resize(pixels, (height, width), preprocess.interpolation)
    planes = np.moveaxis(resized, 2, 0)[:3]
    return np.ascontiguousarray(
        centre(planes, preprocess.size) if preprocess.resize == "crop" else planes
    )


def failure_class(reason: str) -> str:
    """Which of `CLASSES` a reason is of: few and fixed, for counting.

    >>> failure_class("too many pixels (50000 x 50000)")
    'too-large'
    """
    if " is not read" in reason:
        return "unsupported-format"
    found = (name for start, name in _CLASSES.items() if reason.startswith(start))
    return next(found, "unreadable")


def quarantine_row(path: str, reason: str, size_in_bytes: int) -> dict[str, Any]:
    """What quarantine.jsonl says of one image."""
    kind = failure_class(reason)
    return {"path": path, "class": kind, "reason": reason, "bytes": size_in_bytes}


class Quarantine:
    """The images that could not be used, one row each; with `strict` the first one raises."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, error: ImageError, size_in_bytes: int) -> None:
        """Note an image once, however often it is met."""
        if self.strict:
            raise error
        row = quarantine_row(error.path, error.reason, size_in_bytes)
        self._rows.setdefault(error.path, row)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """`path`, `class`, `reason` and `bytes` of each, in the order in which they were met."""
        return list(self._rows.values())

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


@contextmanager
def upright(data: bytes, path: str) -> Iterator[np.ndarray]:
    """Decode as `decode` does: (H, W, 3), or (H, W, 4) with a filler, which torch resizes faster.

    The memory that it takes is counted in the process's budget until the block ends.
    """
    if not data:
        raise ImageError(path, "empty file")
    decoder = jpeg.decode if data.startswith(b"\xff\xd8") else decoding.decode
    with decoder(data, path) as pixels:
        yield pixels


def centre(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut (C, *size) from the centre of (C, H, W), with black around what is smaller."""
    top, left = (-((have - want) // 2) for have, want in zip(planes.shape[1:], size, strict=True))
    bottom, right = size[0] - planes.shape[1] - top, size[1] - planes.shape[2] - left
    cut = planes[
        :,
        max(0, -top) : planes.shape[1] + min(0, bottom),
        max(0, -left) : planes.shape[2] + min(0, right),
    ]
    around = [(max(0, top), max(0, bottom)), (max(0, left), max(0, right))]
    return np.pad(cut, [(0, 0), *around])
