"""What each model finds for ten captions: five photos a model, the right one marked."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from crosstill import images
from crosstill.cache import CacheBase, Split
from crosstill.types import Features

QUERIES = 10
TOP = 5
SIDE = 112  # pixels of the longer side


@dataclass(frozen=True)
class Found:
    """One photo in one model's answer."""

    photo: str  # data URI
    alt: str
    right: bool


@dataclass(frozen=True)
class Answer:
    """What one model finds: its first photos, and where the right one stands."""

    model: str
    found: tuple[Found, ...]
    rank: int


@dataclass(frozen=True)
class Query:
    """A caption and the models' answers to it."""

    caption: str
    answers: tuple[Answer, ...]


def queries(
    cache: CacheBase, split: Split, seen: Mapping[str, Features], count: int = QUERIES
) -> list[Query]:
    """Captions spread evenly over the split, always the same ones.

    Raises:
        DataError: a photo is no longer where the cache found it.
        MismatchError: a photo has changed since.
    """
    chosen = np.unique(np.linspace(0, len(split.captions) - 1, count).round().astype(int))
    photos = _Photos(cache, split)
    return [_query(int(row), split, seen, photos) for row in chosen]


def _query(row: int, split: Split, seen: Mapping[str, Features], photos: _Photos) -> Query:
    right = int(split.owner[row])
    answers = []
    for model, rows in seen.items():
        order = (rows.image @ rows.text[row]).argsort(descending=True, stable=True)
        rank = int((order == right).nonzero()) + 1
        first = [photos.found(place, place == right) for place in order[:TOP].tolist()]
        answers.append(Answer(model, tuple(first), rank))
    return Query(photos.cache.texts[int(split.captions[row])], tuple(answers))


class _Photos:
    """Small JPEGs of a split's photos, each decoded once."""

    def __init__(self, cache: CacheBase, split: Split) -> None:
        self.cache, self.split = cache, split
        self._made: dict[int, str] = {}
        owners, first = np.unique(split.owner, return_index=True)
        self._caption = dict(zip(owners.tolist(), split.captions[first].tolist(), strict=True))

    def found(self, place: int, right: bool) -> Found:
        """The photo at a position of the split; it is described by its first caption."""
        if place not in self._made:
            self._made[place] = _thumbnail(self.cache, int(self.split.images[place]))
        return Found(self._made[place], self.cache.texts[self._caption[place]], right)


def _thumbnail(cache: CacheBase, row: int) -> str:
    pixels = images.decode(cache.photo(row), cache.paths[row])
    picture = Image.fromarray(torch.Tensor.numpy(pixels))
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
