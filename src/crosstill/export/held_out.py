"""Photos and texts that a student was not trained on, and what a model makes of them.

Where they are pairs a model's recall is measured, else how far it agrees with the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import CacheBase
from crosstill.data import Pairs
from crosstill.evaluate import embed
from crosstill.evaluate.agreement import agreement, both_rows, without_pairs
from crosstill.evaluate.embedding import embed_texts, sound
from crosstill.evaluate.evaluation import Evaluation, judge
from crosstill.teachers.base import Teacher
from crosstill.types import Features


@dataclass(frozen=True)
class Measured:
    """Figures of a model on held-out photos and texts.

    Attributes:
        evaluation: the figures.
        texts: (T, D) its rows of the texts.
        owners: (T,) id of the photo that each text belongs to; "" of a text without one.
    """

    evaluation: Evaluation
    texts: Tensor
    owners: Sequence[str]


class HeldOut(Protocol):
    """Photos and texts to measure on."""

    def measure(self, model: Teacher) -> Measured:
        """Embed all of them with a model and measure how it ranks.

        Raises:
            DataError, ImageError: a photo cannot be read.
        """


@dataclass(frozen=True)
class HeldOutPairs:
    """Photos with captions."""

    pairs: Pairs

    def measure(self, model: Teacher) -> Measured:
        """As `HeldOut.measure`: recall."""
        rows = embed(model, self.pairs)
        owners = [rows.image_ids[row] for row in rows.owner.tolist()]
        return Measured(judge(model, rows), rows.text, owners)


class HeldOutRows:
    """Photos and texts that belong to none, with the teacher's rows of them."""

    def __init__(self, cache: CacheBase, split: str) -> None:
        whole, photos = cache.split(split), cache.pairs(split)
        rows = without_pairs(cache, whole)
        places = np.searchsorted(whole.images, rows.images)
        self._photos = replace(photos, examples=tuple(photos.examples[i] for i in places))
        self._texts = [cache.texts[row] for row in rows.captions]
        self._teacher = both_rows(cache, rows)

    def measure(self, model: Teacher) -> Measured:
        """As `HeldOut.measure`: agreement with the teacher."""
        chunks = sound(self._photos, model.preprocess)
        images = [model.embed_images(torch.stack(chunk)).cpu() for chunk in chunks]
        image = torch.cat(images) if images else torch.empty(0, model.dim)
        text = embed_texts(model, self._texts)
        ranking = agreement(Features(image, text), *self._teacher)
        evaluation = Evaluation(model.name, ranking, model.parameter_count())
        return Measured(evaluation, text, [""] * len(text))
