"""The format of a score cache: a fusion teacher's scores of chosen pairs of images and captions.

A score cache is a folder:

    scores.json        sealed header: teacher, data, candidates, SHA-256 of every other file
    images.parquet     one row an image: image_id, path, split
    captions.parquet   one row a caption: image (row of images.parquet), text
    indptr.npy         int64 (I + 1,): the pairs of image i are indptr[i] to indptr[i + 1]
    captions.npy       int32 (P,): caption row of each pair, ascending within an image
    score-00000.npy …  float32: the scores of the pairs of consecutive images, higher is better
    quarantine.jsonl   images that could not be read, with the reason
    pixels/            decoded photos for students, made on demand

Rows are in the order of the image ids. Every caption is paired with its own image, and with as
many others as were asked for. Without a teacher the pairs are there and no scores.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crosstill import artefacts
from crosstill.cache import format
from crosstill.errors import CorruptError

FORMAT = 1
HEADER = "scores.json"
INDPTR = "indptr.npy"
PAIRS = "captions.npy"


class Partners(NamedTuple):
    """The false partners of all queries: those of query q are indptr[q] to indptr[q + 1]."""

    indptr: np.ndarray  # (Q + 1,)
    rows: np.ndarray  # (F,) row of each partner, ascending within a query
    pairs: np.ndarray  # (F,) which of all pairs it is

    def counts(self, queries: np.ndarray) -> np.ndarray:
        """Count the false partners of some queries."""
        return self.indptr[queries + 1] - self.indptr[queries]


class ScoreCache(format.CacheBase):
    """An opened score cache.

    Attributes:
        indptr: (I + 1,) int64, see the format above.
        pair_images: (P,) int32 image row of each pair, ascending.
        pair_captions: (P,) int32 caption row of each pair.
        scores: (P,) float32; None when no teacher scored them.
        true_scores: (T,) float32 score of each caption with its own image, or None.
        by_image: false captions of each image.
        by_caption: false images of each caption.
    """

    file = HEADER
    version = FORMAT
    model = format.Header
    task = "crosstill.fusion.list_task:ListTask"
    noun = "a score cache"
    contents = "scores of pairs"
    remedy = "a score cache with `crosstill cache` and a fusion model"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.indptr = self._load(INDPTR, "i")
        self.pair_captions = self._load(PAIRS, "i")
        self._check_pairs()
        rows = np.arange(len(self.image_ids), dtype=np.int32)
        self.pair_images = np.repeat(rows, np.diff(self.indptr))
        self.scores: Tensor | None = self._read_scores()
        true = self.owner[self.pair_captions] == self.pair_images
        self.true_scores = None if self.scores is None else self.scores.numpy()[true]
        false = np.flatnonzero(~true)
        self.by_image = _grouped(self.pair_images, self.pair_captions, false, len(self.image_ids))
        self.by_caption = _grouped(self.pair_captions, self.pair_images, false, len(self.texts))

    def of_image(self, image: int) -> tuple[np.ndarray, np.ndarray | None]:
        """List the false captions of an image row, ascending, and their scores, if any."""
        return self._of(self.by_image, image)

    def of_caption(self, caption: int) -> tuple[np.ndarray, np.ndarray | None]:
        """List the false images of a caption row, ascending, and their scores, if any."""
        return self._of(self.by_caption, caption)

    def summary(self) -> str:
        """As `CacheBase.summary`: the number of pairs, and how many of each were wanted."""
        pairs, key = f"{len(self.pair_captions):,} pairs", self.header["key"]
        scored = pairs if self.scores is not None else f"{pairs} without scores"
        counts = f"F = {key['false']} false captions an image, {key['false_images']} images a"
        return f"{scored} ({counts} caption)"

    def least_false(self, split: str) -> tuple[int, int]:
        """Count the fewest false captions of an image of a split, and false images of a caption."""
        rows = self.split(split)
        captions = self.by_image.counts(rows.images).min()
        return int(captions), int(self.by_caption.counts(rows.captions).min())

    def _of(self, partners: Partners, query: int) -> tuple[np.ndarray, np.ndarray | None]:
        places = slice(partners.indptr[query], partners.indptr[query + 1])
        scores = None if self.scores is None else self.scores.numpy()[partners.pairs[places]]
        return partners.rows[places], scores

    def _read_scores(self) -> Tensor | None:
        names = sorted(name for name in self.header["files"] if name.startswith("score-"))
        if not names:
            return None
        scores = np.concatenate([self._load(name, "f") for name in names])
        if len(scores) != len(self.pair_captions):
            raise CorruptError(f"{self.folder / self.file}: its scores do not add up")
        return torch.from_numpy(scores)

    def _check_pairs(self) -> None:
        """Refuse pairs of images or captions that there are not."""
        pairs, steps = self.pair_captions, np.diff(self.indptr)
        ends = len(self.indptr) == len(self.image_ids) + 1 and (self.indptr[0], self.indptr[-1])
        inside = not len(pairs) or 0 <= pairs.min() <= pairs.max() < len(self.texts)
        if ends != (0, len(pairs)) or (steps < 0).any() or not inside:
            raise CorruptError(f"{self.folder / self.file}: its pairs do not add up")

    def _load(self, name: str, kinds: str) -> np.ndarray:
        return artefacts.array(self.folder / name, kinds, 1)


def _grouped(queries: np.ndarray, partners: np.ndarray, false: np.ndarray, count: int) -> Partners:
    """Group false pairs by query; a stable sort keeps the partners of each ascending."""
    pairs = false[queries[false].argsort(kind="stable")]
    counts = np.bincount(queries[false], minlength=count)
    return Partners(np.concatenate([[0], counts.cumsum()]), partners[pairs], pairs)
