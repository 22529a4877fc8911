"""Validation of a fusion model: each query among its own candidates of a score cache.

The whole split would be images x captions passes after every epoch. Here only the pairs that the
cache lists are scored, so that recall is that of re-ranking; what is not listed counts as behind.
"""

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import Split
from crosstill.evaluate.bootstrap import Answers
from crosstill.evaluate.embedding import cached_truth
from crosstill.evaluate.recall import DEPTHS, Retrieval, chances_of_scores, from_scores
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.scores import ScoreCache
from crosstill.fusion.states import Sides
from crosstill.teachers.base import evaluating
from crosstill.train.config import TrainConfig
from crosstill.types import States

BLOCK = 64  # images whose states are in memory at a time


class Listed:
    """The P pairs of one split that a score cache lists, by position in the split.

    Attributes:
        image: (P,) of each pair's image, ascending.
        text: (P,) of its caption.
        owner: (T,) int64, the image of each caption.
        truth: which images and captions belong together.
    """

    def __init__(self, cache: ScoreCache, split: Split) -> None:
        inside = np.isin(cache.pair_images, split.images)
        self.image = np.searchsorted(split.images, cache.pair_images[inside])
        self.text = np.searchsorted(split.captions, cache.pair_captions[inside])
        self.truth = cached_truth(cache, split)
        self.owner = self.truth.owner
        self._told = None if cache.scores is None else cache.scores[torch.from_numpy(inside)]

    def matrix(self, scores: Tensor) -> Tensor:
        """Scores (P,) as (I, T), -inf for what is not listed."""
        whole = torch.full((int(self.owner.max()) + 1, len(self.owner)), -torch.inf)
        whole[torch.from_numpy(self.image), torch.from_numpy(self.text)] = scores
        return whole

    def teacher_recall(self) -> Retrieval | None:
        """The recall of the teacher's scores, where the cache has them."""
        return None if self._told is None else from_scores(self.matrix(self._told), self.truth)

    @property
    def said(self) -> str:
        """What a reader of such a recall has to know, in sentences."""
        false = self.owner.numpy()[self.text] != self.image
        images = np.bincount(self.image[false], minlength=int(self.owner.max()) + 1)
        captions = np.bincount(self.text[false], minlength=len(self.owner))
        text = (
            "Each query ranks only its true partners and the false ones that the score cache lists "
            f"for it, on average {images.mean():.1f} captions of an image and "
            f"{captions.mean():.1f} images of a caption, not the whole split."
        )
        sure = [float((count < DEPTHS[-1]).mean()) for count in (images, captions)]
        parts = [f"{s:.0%} of {w}" for s, w in zip(sure, ("images", "captions"), strict=True) if s]
        if parts:
            text += (
                f" R@{DEPTHS[-1]} is 100 for any model on the {' and '.join(parts)} that have "
                f"fewer than {DEPTHS[-1]} false ones."
            )
        return text


class MatchedSplit:
    """A fusion model on the listed pairs of one split."""

    def __init__(self, cache: ScoreCache, split: Split, sides: Sides) -> None:
        self._sides, self._listed = sides, Listed(cache, split)

    def recall(self, model: Matcher) -> Retrieval:
        """The model's recall among the listed candidates."""
        return from_scores(self._matrix(model), self._listed.truth)

    def answers(self, model: Matcher) -> Answers:
        """How each query fared among its listed candidates."""
        truth = self._listed.truth
        return Answers(*chances_of_scores(self._matrix(model), truth), truth.owner)

    def teacher_recall(self) -> Retrieval | None:
        """As `recall`, of the teacher's scores, where the cache has them."""
        return self._listed.teacher_recall()

    def _matrix(self, model: Matcher) -> Tensor:
        with evaluating(model):
            last = int(self._listed.image.max()) + 1
            parts = [self._block(model, start) for start in range(0, last, BLOCK)]
        return self._listed.matrix(torch.cat(parts))

    def _block(self, model: Matcher, start: int) -> Tensor:
        mine = (self._listed.image >= start) & (self._listed.image < start + BLOCK)
        images, image = np.unique(self._listed.image[mine], return_inverse=True)
        texts, text = np.unique(self._listed.text[mine], return_inverse=True)
        sides = run_towers(model, self._sides, images, texts)
        entered = model.project(sides[0], "image"), model.project(sides[1], "text")
        pairs = torch.from_numpy(np.stack([image, text], axis=1))
        return model.score_pairs(*entered, pairs)


def validation_split(
    model: Matcher, cache: ScoreCache, split: Split, settings: TrainConfig
) -> MatchedSplit:
    """Open a split for a model that was read back from a run: frozen towers do not run again."""
    if settings.towers == "frozen":
        model.freeze_towers()
    return MatchedSplit(cache, split, Sides(model, cache, split))


def run_towers(
    model: Matcher, sides: Sides, images: np.ndarray, texts: np.ndarray
) -> tuple[States, States]:
    """Towers' states of images and texts at these positions, kept or computed now."""
    seen, read = sides.images(images), sides.texts(texts)
    read = States(*(part.to(model.device) for part in read))
    if isinstance(seen, States):
        return States(*(part.to(model.device) for part in seen)), read
    return model.encode_mixed(list(seen)), model.encode_texts(read)
