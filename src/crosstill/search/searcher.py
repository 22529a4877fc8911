"""Search an index: words or a photo in, the nearest photos out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from crosstill import artefacts
from crosstill.bundle import Bundle, Encoder, calibration, check_same
from crosstill.errors import ConfigError, CrosstillError
from crosstill.search import catalogue, index_folder, vector_index

log = logging.getLogger(__name__)

MAX_TOP = 1000
_SPARE = 16  # more hits than asked of Milvus, which may still know photos that have left the index
CAPTIONS = 1000  # that are searched at most: enough for a rate of one in a hundred
# Lower, and captions of photos much like those of the index would find nothing: see docs/search.md.
RATE = 0.5
STEPS = 200  # between the quantiles that are kept


@dataclass(frozen=True)
class Hit:
    """One photo that was found.

    Attributes:
        id: SHA-256 of its bytes, in hex.
        score: cosine with the query.
        path: relative to the folder of the photos; may hold any characters: see `errors.printable`.
        caption: of its text file; "" where it has none.
    """

    id: str
    score: float
    path: str
    caption: str


@dataclass(frozen=True)
class Photo:
    """One photo of the index.

    Attributes:
        id: SHA-256 of its bytes, in hex.
        path: where it was when it was indexed, absolute.
        relative: the same, relative to the folder of the photos.
        size: in bytes.
        mtime_ns: when it was last written.
        caption: of its text file; "" where it has none.
    """

    id: str
    path: Path
    relative: str
    size: int
    mtime_ns: int
    caption: str


@dataclass(frozen=True)
class _Generation:
    """An open generation, replaced as a whole when the index switches."""

    pointer: index_folder.Pointer
    photos: catalogue.Catalogue
    vectors: vector_index.VectorIndex


class Searcher:
    """Searches an index with the bundle that made it. Several threads may share one."""

    def __init__(
        self, index: Path, bundle: Bundle, generation: _Generation, threads: int = 1
    ) -> None:
        self.index, self.bundle, self._threads = index, bundle, threads
        self._opened, self._refreshing, self._last_error = generation, Lock(), ""
        self._encoder = Encoder(bundle, threads)

    @classmethod
    def open(cls, index: Path, bundle: Path | None = None, threads: int = 1) -> Searcher:
        """Open an index.

        Args:
            index: the folder that `crosstill index` made.
            bundle: use this one in place of the index's own copy.
            threads: that one pass of the encoder, or one search, may use.

        Raises:
            DataError: there is no index.
            CorruptError: a file of it is damaged; it is named.
            MismatchError: the index was made with another bundle.
        """

        def both(pointer: index_folder.Pointer) -> tuple[Bundle, _Generation]:
            used = Bundle.open(bundle or artefacts.member(index, pointer.bundle))
            what = f"{index} was not made with the bundle {used.folder}"
            check_same(pointer.identity, used.identity, what)
            return used, _open(index, pointer, threads)

        return cls(index, *index_folder.open_settled(index, both), threads)

    def __len__(self) -> int:
        return len(self._opened.photos)

    @property
    def generation(self) -> int:
        """Return the number of the generation that is searched."""
        return self._opened.pointer.generation

    @property
    def folder(self) -> Path:
        """Return the folder of the photos."""
        return Path(self._opened.pointer.folder)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Encode B texts → unit rows float32 (B, D)."""
        return self._encoder.encode_texts(texts)

    def notes(self, text: str) -> list[str]:
        """Return a sentence for each part of a query that this model cannot use."""
        return self._encoder.notes(text)

    def encode_image(self, data: bytes, name: str) -> np.ndarray:
        """Encode a photo's bytes → a unit vector float32 (D,).

        Raises:
            ImageError: it cannot be read; `name` is named.
        """
        return self._encoder.encode_images(self._encoder.load(data, name)[None])[0]

    def vector(self, photo_id: str) -> np.ndarray | None:
        """Return the vector float32 (D,) of a photo of the index, None where it is not in it."""
        opened = self._opened
        entry = _entry(opened, photo_id)
        try:
            return opened.vectors.vectors(np.array([entry.id]))[0] if entry else None
        except KeyError:  # Milvus has let go of it already
            return None

    def find(
        self, vectors: np.ndarray, top: int, threshold: float | None = None
    ) -> list[list[Hit]]:
        """Find the nearest photos of each query, best first.

        Args:
            vectors: unit rows float32 (B, D).
            top: how many at most, 1 to `MAX_TOP`.
            threshold: leave out photos that score less; a query may then have no hits.

        Raises:
            ConfigError: `top` or the shape of the vectors cannot be.
        """
        if not 1 <= top <= MAX_TOP:
            raise ConfigError(f"top {top}: give a number from 1 to {MAX_TOP}")
        opened = self._opened
        if vectors.ndim != 2 or vectors.shape[1] != opened.pointer.dim:
            raise ConfigError(f"queries of shape {vectors.shape}: give (B, {opened.pointer.dim})")
        least = -np.inf if threshold is None else threshold
        wanted = top + _SPARE if opened.pointer.milvus else top
        scores, ids = opened.vectors.search(np.ascontiguousarray(vectors, np.float32), wanted)
        return [_hits(opened, *row, least)[:top] for row in zip(scores, ids, strict=True)]

    def threshold(self, rate: float = RATE) -> float:
        """Return the score that this share of captions of other images reaches in this index.

        Raises:
            ConfigError: the bundle holds no captions to calibrate on, or no such rate.
        """
        return quantile_score(self._opened.pointer.quantiles, rate)

    def check_calibrated(self) -> None:
        """Refuse an index that no threshold was calibrated for.

        Raises:
            ConfigError: the bundle held no captions to calibrate on.
        """
        self.threshold()

    def photo(self, photo_id: str) -> Photo | None:
        """Return the photo of an id, None where the index does not hold it."""
        opened = self._opened
        entry = _entry(opened, photo_id)
        if entry is None:
            return None
        where = Path(opened.pointer.folder) / entry.path
        return Photo(photo_id, where, entry.path, entry.size, entry.mtime_ns, entry.caption)

    def refresh(self) -> bool:
        """Open the newest generation; return whether there was a newer one.

        Queries that are under way end with what they began with. An index that cannot be opened,
        or that another bundle has rebuilt, is logged once; the old one goes on serving.
        """
        with self._refreshing:
            try:
                if index_folder.read_pointer(self.index) == self._opened.pointer:
                    return False
                self._opened = index_folder.open_settled(self.index, self._newer)
                return True
            except (CrosstillError, OSError) as error:
                if str(error) != self._last_error:
                    log.warning("still serving generation %d: %s", self.generation, error)
                self._last_error = str(error)
                return False

    def warm(self) -> None:
        """Run both towers and one search: the first ones are slower than the others."""
        self._encoder.warm()
        self.find(self.encode_texts(["a photo"]), 1)

    def close(self) -> None:
        self._opened.vectors.close()
        self._opened.photos.close()

    def _newer(self, pointer: index_folder.Pointer) -> _Generation:
        what = f"{self.index} was made anew with another bundle, start again to take it up"
        check_same(pointer.identity, self.bundle.identity, what)
        return _open(self.index, pointer, self._threads, self._opened)


def calibrate(
    bundle: Bundle, vectors: vector_index.VectorIndex, numbers: Mapping[bytes, int]
) -> list[float] | None:
    """Compute quantiles of the best score of each caption among photos that are not its own.

    A search always finds something. How much a score is worth depends on the student and on what
    the index holds, so captions that the student has not learnt are searched in it, each without
    the photo that it belongs to. What half of them do not reach is a poor score for a query whose
    photo is there, and more than a query reaches that has nothing to do with the photos.

    Args:
        bundle: holds the captions.
        vectors: to search in.
        numbers: of the photos in the index, by the SHA-256 of their bytes.

    Returns:
        `STEPS` + 1 scores from the lowest to the highest; None without captions or other photos.
    """
    captions = calibration(bundle)
    if captions is None:
        return None
    rows, images = captions
    some = np.linspace(0, len(rows) - 1, min(len(rows), CAPTIONS)).astype(int)
    own = np.array([numbers.get(bytes.fromhex(images[row]), -2) for row in some])
    scores, ids = vectors.search(rows[some], 2)
    best = np.where(ids[:, 0] == own, scores[:, 1], scores[:, 0])
    best = best[np.isfinite(best)]
    if not len(best):
        return None
    levels = np.quantile(best, np.linspace(0, 1, STEPS + 1))
    return [round(float(score), 6) for score in levels]


def quantile_score(levels: list[float] | None, rate: float) -> float:
    """Return the score that only this share of the calibration captions reaches.

    Raises:
        ConfigError: nothing was calibrated, or the rate is not between 0 and 1.
    """
    if levels is None:
        raise ConfigError(
            "this index has no calibrated threshold, since its bundle holds no captions to "
            "calibrate on; give a score, or export the bundle with its data"
        )
    if not 0 < rate < 1:
        raise ConfigError(f"rate {rate}: give a share between 0 and 1")
    return float(np.interp(1 - rate, np.linspace(0, 1, len(levels)), levels))


def combine(*vectors: np.ndarray) -> np.ndarray:
    """Combine several vectors (D,) to one query: their sum, of unit length.

    Raises:
        ConfigError: they cancel each other out.
    """
    total = np.sum(vectors, axis=0)
    length = float(np.linalg.norm(total))
    if length < 1e-6:
        raise ConfigError("the text and the photo cancel each other out; search by one of them")
    return (total / length).astype(np.float32)


def _open(
    index: Path, pointer: index_folder.Pointer, threads: int, before: _Generation | None = None
) -> _Generation:
    index_folder.check_generation(index, pointer)
    photos = catalogue.Catalogue(
        index_folder.generation_folder(index, pointer.generation) / catalogue.NAME
    )
    if before and pointer.milvus and before.pointer.milvus == pointer.milvus:
        return _Generation(pointer, photos, before.vectors)
    return _Generation(pointer, photos, index_folder.open_vectors(index, pointer, threads))


def _entry(opened: _Generation, photo_id: str) -> catalogue.Entry | None:
    return opened.photos.find(photo_id) if re.fullmatch("[0-9a-f]{64}", photo_id) else None


def _hits(opened: _Generation, scores: np.ndarray, ids: np.ndarray, least: float) -> list[Hit]:
    ranked = [(int(i), float(s)) for i, s in zip(ids, scores, strict=True) if i >= 0 and s >= least]
    entries = opened.photos.entries(number for number, _ in ranked)
    present = [(entries[number], score) for number, score in ranked if number in entries]
    return [Hit(entry.sha, score, entry.path, entry.caption) for entry, score in present]
