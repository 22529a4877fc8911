"""Scores of a fusion model on a whole split: every pair, or those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosstill import progress
from crosstill.data import Pairs
from crosstill.evaluate.efficiency import Stopwatch
from crosstill.evaluate.reading import BATCH, captions, readable, sound
from crosstill.evaluate.truth import Truth, of_texts
from crosstill.formats import by_length
from crosstill.images import Quarantine
from crosstill.teachers.matcher import GPU_PAIRS, PAIRS, Matcher
from crosstill.types import States

KEPT = 2**31  # bytes of texts' states that are kept for the next images, not read again
PASSES = 16  # between two moves of the bar


@dataclass(frozen=True)
class Scored:
    """A split as a fusion model sees it.

    Attributes:
        scores: (I, T) float32 logits, -inf where none was asked for.
        truth: which images and captions belong together.
        image_ids: of the I images.
        quarantine: the images that were left out.
        passes: pairs scored.
        towers: seconds spent on either side alone.
        matching: seconds spent on pairs.
    """

    scores: Tensor
    truth: Truth
    image_ids: list[str]
    quarantine: Quarantine
    passes: int
    towers: float
    matching: float


def score_matrix(model: Matcher, pairs: Pairs, strict: bool = False) -> Scored:
    """Score every image of a dataset with every caption.

    Raises:
        DataError: no image is readable.
        ImageError: an image is unreadable and `strict` is set.
        ModelError: a score is NaN or infinite.
    """
    return score(model, readable(pairs, [model.preprocess], strict))


def score(model: Matcher, pairs: Pairs, wanted: Tensor | None = None) -> Scored:
    """Score pairs of a dataset whose images were found `readable`; each image is seen once.

    Args:
        model: what scores.
        pairs: I images and their T captions.
        wanted: (I, T) bool, which pairs; None means all.

    Raises:
        ImageError: an image has become unreadable.
        ModelError: a score is NaN or infinite.
    """
    texts, owner = captions(pairs.examples)
    scores = torch.full((len(pairs), len(texts)), -torch.inf)
    wanted = torch.ones(scores.shape, dtype=torch.bool) if wanted is None else wanted
    passes = int(wanted.sum())
    towers, matching = Stopwatch(), Stopwatch()
    reader = _Reader(model, texts, towers)
    step = PASSES * (PAIRS if model.device.type == "cpu" else GPU_PAIRS)
    first = 0
    with progress.bar("pairs", passes) as bar:
        for pixels in sound(pairs, model.preprocess):
            rows = slice(first, first + len(pixels))
            first = rows.stop
            with towers.running():
                seen = model.image_states(pixels)
            for columns, read in reader.blocks():
                # text by text, so that pairs of one length follow each other
                asked = wanted[rows, columns].T.nonzero().flip(1)
                for some in asked.split(step):
                    with matching.running():
                        found = model.match_pairs(seen, read, some)
                    scores[rows.start + some[:, 0], columns[some[:, 1]]] = found
                    bar.advance(len(some))
    return Scored(
        scores=scores,
        truth=of_texts(owner, texts),
        image_ids=[example.image_id for example in pairs.examples],
        quarantine=pairs.quarantine,
        passes=passes,
        towers=towers.seconds,
        matching=matching.seconds,
    )


class _Reader:
    """States of all captions, again for every block of images; kept as far as `KEPT` goes."""

    def __init__(self, model: Matcher, texts: Sequence[str], watch: Stopwatch) -> None:
        self._model, self._texts, self._watch = model, texts, watch
        self._chunks = by_length(map(len, texts), BATCH)
        self._kept: dict[int, States] = {}
        self._bytes = 0

    def blocks(self) -> Iterator[tuple[Tensor, States]]:
        """Rows of some captions of similar length, and their states."""
        for place, rows in enumerate(self._chunks):
            yield torch.tensor(rows), self._states(place, [self._texts[row] for row in rows])

    def _states(self, place: int, texts: list[str]) -> States:
        if place in self._kept:
            return self._kept[place]
        with self._watch.running():
            states = self._model.text_states(texts)
        size = states.hidden.nbytes + states.mask.nbytes
        if self._bytes + size <= KEPT:
            self._bytes += size
            self._kept[place] = states
        return states
