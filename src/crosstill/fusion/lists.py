"""Batches of candidate lists: what a score cache teaches, one step at a time.

Each of a batch's B pairs asks twice: its image ranks captions, its caption ranks images. Of the
candidates that the teacher scored, only the hardest few go on to the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import Split, pixels
from crosstill.evaluate import frozen_images, frozen_texts
from crosstill.fusion.scores import ScoreCache
from crosstill.fusion.states import Sides
from crosstill.students.student import Student, Tokens
from crosstill.train.batches import Picked, Sampler, ahead
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group

FALSE = 63  # F, candidates of a list that a teacher beside the student scores, as DCD has it


@dataclass(frozen=True)
class Ways:
    """Which lists are asked for, and how long."""

    names: tuple[str, ...]  # of "image" and "text"
    hardest: int  # negatives of each list that reach the student


@dataclass(frozen=True)
class Asked:
    """One way's lists of a batch: rows of the batch's own images and texts."""

    partners: Tensor  # (B, N) int64; column 0 is the true one
    valid: Tensor  # (B, N) bool
    teacher: Tensor | None


@dataclass(frozen=True)
class ListBatch:
    """One step's input. Images and texts are distinct; lists and pairs name them by row."""

    images: Any  # for a dual encoder uint8 (I, 3, H, W) or pooled (I, W); for a fusion model
    texts: Any  # Tokens or pooled (T, W); for a fusion model what `Sides` gives
    pairs: tuple[Tensor, Tensor]  # (B,) rows of images and of texts
    lists: dict[str, Asked]
    ids: Tensor  # (B,) int64 keys of the images
    picked: Picked


class DualInputs:
    """A dual encoder's inputs by position in a split."""

    def __init__(
        self, cache: ScoreCache, split: Split, student: Student, config: TrainConfig
    ) -> None:
        self._student = student
        self._tokens = student.tokenize([cache.texts[row] for row in split.captions])
        frozen = config.freeze
        self._pooled_images = frozen_images(student, cache, split) if frozen == "image" else None
        self._pooled_texts = frozen_texts(student, cache, split) if frozen == "text" else None
        if self._pooled_images is None:
            self._photos = pixels(cache, split, student.preprocess)

    def images(self, positions: np.ndarray) -> Tensor:
        """uint8 (I, 3, H, W), or pooled (I, W) of a frozen tower."""
        if self._pooled_images is not None:
            return self._pooled_images[torch.from_numpy(positions)]
        return self._photos.take(positions)

    def texts(self, positions: np.ndarray) -> Tokens | Tensor:
        """Tokens, or pooled (T, W) of a frozen tower."""
        if self._pooled_texts is not None:
            return self._pooled_texts[torch.from_numpy(positions)]
        return self._student.pad([self._tokens[row] for row in positions])


class ListStream:
    """The batches of one split: a pure function of seed, epoch and step."""

    def __init__(
        self,
        cache: ScoreCache,
        split: Split,
        inputs: DualInputs | Sides,
        ways: Ways,
        config: TrainConfig,
        group: Group,
    ) -> None:
        self.cache, self.split, self.inputs, self.group = cache, split, inputs, group
        self.sampler = Sampler(
            split,
            config.batch_size,
            config.captions_per_image,
            config.seed,
            steps=config.steps_per_epoch,
        )
        self._ways, self._config = ways, config

    def batch(self, epoch: int, step: int) -> ListBatch:
        """The batch of one step."""
        picked = self.sampler.pick(epoch, step)
        random = np.random.default_rng([self._config.seed, epoch, step])
        draw = self._draw_anew if self._config.teacher else self._draw
        draw = self._take_batch if self._config.negatives == "batch" else draw
        drawn = {way: draw(way, picked, random) for way in self._ways.names}
        images, image_rows = _distinct(picked.images, drawn.get("text"))
        texts, text_rows = _distinct(picked.captions, drawn.get("image"))
        partners = {"image": text_rows, "text": image_rows}
        lists = {
            way: Asked(
                torch.from_numpy(partners[way][1]),
                torch.from_numpy(found.valid),
                None if found.scores is None else torch.from_numpy(found.scores),
            )
            for way, found in drawn.items()
        }
        batch = ListBatch(
            self.inputs.images(images),
            self.inputs.texts(texts),
            (torch.from_numpy(image_rows[0]), torch.from_numpy(text_rows[0])),
            lists,
            self.cache.keys[torch.from_numpy(self.split.images[picked.images])],
            picked,
        )
        return _to(batch, self.group.device)

    def ahead(self, epoch: int, first: int) -> Iterator[tuple[int, ListBatch, float]]:
        """(step, batch, seconds waited for it) from step `first` to the end of the epoch."""
        yield from ahead(self.batch, epoch, range(first, self.sampler.steps_per_epoch))

    def _draw(self, way: str, picked: Picked, random: np.random.Generator) -> Drawn:
        """The lists of one way, as positions in the split."""
        sides = (picked.images, self.split.images), (picked.captions, self.split.captions)
        (asks, rows), (true, held) = sides if way == "image" else sides[::-1]
        of = self.cache.of_image if way == "image" else self.cache.of_caption
        size = 1 + self._ways.hardest
        partners = np.repeat(true[:, None], size, axis=1)
        valid = np.zeros(partners.shape, dtype=bool)
        valid[:, 0] = True
        known = self.cache.true_scores
        scores = None if known is None else np.zeros(partners.shape, dtype=np.float32)
        if scores is not None and known is not None:
            scores[:, 0] = known[self.split.captions[picked.captions]]
        for row, ask in enumerate(asks):
            false, told = of(int(rows[ask]))
            kept = self._choose(told, len(false), size - 1, random)
            stop = 1 + len(kept)
            partners[row, 1:stop] = np.searchsorted(held, false[kept])
            valid[row, 1:stop] = True
            if scores is not None and told is not None:
                scores[row, 1:stop] = told[kept]
        return Drawn(partners, valid, scores)

    def _draw_anew(self, way: str, picked: Picked, random: np.random.Generator) -> Drawn:
        """F random partners of any other image, which a teacher that runs beside will score."""
        true = picked.captions if way == "image" else picked.images
        count = len(self.split.captions if way == "image" else self.split.images)
        anew = random.integers(count, size=(len(true), self._config.drawn or FALSE))
        shown = self.split.owner[anew] if way == "image" else anew
        valid = np.c_[np.full(len(true), True), shown != picked.images[:, None]]
        return Drawn(np.c_[true, anew], valid, None)

    def _take_batch(self, way: str, picked: Picked, random: np.random.Generator) -> Drawn:
        """Other pairs' partners: with all of them, B x B pairs serve lists of both ways."""
        true = picked.captions if way == "image" else picked.images
        rows = np.arange(len(true))[:, None]
        steps = np.r_[0, 1 + random.permutation(len(true) - 1)[: self._ways.hardest]]
        others = (rows + steps) % len(true)
        valid = picked.images[others] != picked.images[:, None]
        valid[:, 0] = True
        return Drawn(true[others], valid, None)

    def _choose(
        self, scores: np.ndarray | None, count: int, wanted: int, random: np.random.Generator
    ) -> np.ndarray:
        """Which of a query's false candidates go on, from hard to easy where scores say so."""
        kept = random.permutation(count)[: self._config.drawn]
        if scores is None:
            return kept[:wanted]
        if self._config.negatives == "random":
            kept = kept[:wanted]
        return kept[np.argsort(-scores[kept], kind="stable")][:wanted]


@dataclass(frozen=True)
class Drawn:
    """One way's lists as positions in the split."""

    partners: np.ndarray  # (B, N)
    valid: np.ndarray  # (B, N) bool
    scores: np.ndarray | None  # (B, N) float32


def _distinct(
    own: np.ndarray, drawn: Drawn | None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Distinct positions, and where among them the (B,) own and the (B, N) listed ones are."""
    listed = own[:, None] if drawn is None else drawn.partners
    whole, inverse = np.unique(np.concatenate([own, listed.ravel()]), return_inverse=True)
    return whole, (inverse[: len(own)], inverse[len(own) :].reshape(listed.shape))


def _to(batch: ListBatch, device: torch.device) -> ListBatch:
    """The batch on another device, through its tuples and dictionaries."""
    return batch if device.type == "cpu" else _moved(batch, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(part, device) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, ListBatch | Asked):
        return replace(
            value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)}
        )
    return value
