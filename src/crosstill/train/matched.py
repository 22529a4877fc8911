"""Validation of a fusion model: each query among its own candidates of a score cache.

The whole split would be images x captions passes after every epoch. Here only the pairs that the
cache lists are scored, so that recall is that of re-ranking; what is not listed counts as behind.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import ScoreCache, Split
from crosstill.evaluate.recall import Retrieval, from_scores
from crosstill.teachers.matcher import Matcher
from crosstill.train.states import Sides
from crosstill.types import States

BLOCK = 64  # images whose states are in memory at a time


class MatchedSplit:
    """The listed pairs of one split."""

    def __init__(self, cache: ScoreCache, split: Split, sides: Sides) -> None:
        self._sides = sides
        self._owner = torch.from_numpy(split.owner)
        self._inside = np.isin(cache.pair_images, split.images)
        self._image = np.searchsorted(split.images, cache.pair_images[self._inside])
        self._text = np.searchsorted(split.captions, cache.pair_captions[self._inside])
        self._told = cache.scores

    def recall(self, model: Matcher) -> Retrieval:
        """The model's recall among the listed candidates."""
        training = model.training
        model.eval()
        with torch.inference_mode():
            last = int(self._image.max()) + 1
            parts = [self._block(model, start) for start in range(0, last, BLOCK)]
        model.train(training)
        return self._judge(torch.cat(parts))

    def teacher_recall(self) -> Retrieval | None:
        """The same of the teacher's scores, where the cache has them."""
        return (
            None if self._told is None else self._judge(self._told[torch.from_numpy(self._inside)])
        )

    def _block(self, model: Matcher, start: int) -> Tensor:
        mine = (self._image >= start) & (self._image < start + BLOCK)
        images, image = np.unique(self._image[mine], return_inverse=True)
        texts, text = np.unique(self._text[mine], return_inverse=True)
        sides = run_towers(model, self._sides, images, texts)
        entered = model.enter(sides[0], "image"), model.enter(sides[1], "text")
        pairs = torch.from_numpy(np.stack([image, text], axis=1))
        return model.match_pairs(*entered, pairs)

    def _judge(self, scores: Tensor) -> Retrieval:
        matrix = torch.full((int(self._owner.max()) + 1, len(self._owner)), -torch.inf)
        matrix[torch.from_numpy(self._image), torch.from_numpy(self._text)] = scores
        return from_scores(matrix, self._owner)


def run_towers(
    model: Matcher, sides: Sides, images: np.ndarray, texts: np.ndarray
) -> tuple[States, States]:
    """Towers' states of images and texts at these positions, kept or computed now."""
    seen, read = sides.images(images), sides.texts(texts)
    read = States(*(part.to(model.device) for part in read))
    if isinstance(seen, States):
        return States(*(part.to(model.device) for part in seen)), read
    return model.look_at(list(seen)), model.read(read)
