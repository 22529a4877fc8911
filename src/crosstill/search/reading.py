"""Read and decode photos in several threads, ahead of whoever encodes them."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from crosstill import decoding, pixels
from crosstill.errors import ImageError
from crosstill.preprocess import Preprocess
from crosstill.search import walk
from crosstill.search.walk import Stamp
from crosstill.search.work import Known

AHEAD = 24  # photos that each worker may be ahead: 4 MB at 224 pixels


@dataclass(frozen=True)
class Read:
    """One photo off the disk: what to remember of it, and its pixels where they are needed."""

    name: str
    known: Known
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Reader:
    """Reads photos of one folder.

    Attributes:
        root: the folder.
        preprocess: how the student wants its images.
        encoded: SHA-256 of contents that need no pixels. It may grow while photos are read.
        refused: why a content is no photo, by its SHA-256.
    """

    root: Path
    preprocess: Preprocess
    encoded: Container[bytes]
    refused: Mapping[bytes, str]

    def read(self, name: str, stamp: Stamp) -> Read:
        """Read one photo; whatever is wrong with it becomes its reason."""
        began = time.time_ns()
        try:
            data = walk.read(self.root, name)
        except ImageError as error:
            return Read(name, Known(stamp, began, None, reason=error.reason), None)
        sha = hashlib.sha256(data).digest()
        caption = walk.read_caption(self.root, name) if stamp.caption_size >= 0 else ""
        reason, found = self.refused.get(sha, ""), None
        if sha not in self.encoded and not reason:
            try:
                found = pixels.load(data, name, self.preprocess)
            except ImageError as error:
                reason = error.reason
        return Read(name, Known(stamp, began, sha, caption, reason), found)


def ahead(
    read: Callable[[str, Stamp], Read], photos: Mapping[str, Stamp], workers: int
) -> Iterator[Read]:
    """All photos in their order, each read by one of the workers before it is asked for."""
    waiting: deque[Future[Read]] = deque()
    with decoding.in_threads(workers) as pool:
        for item in photos.items():
            waiting.append(pool.submit(read, *item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def grouped(reads: Iterator[Read], size: int) -> Iterator[list[Read]]:
    """So many at a time; the last ones may be fewer."""
    while group := list(islice(reads, size)):
        yield group
