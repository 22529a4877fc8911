"""From rows to tensors: the batches of a run, made one ahead of the step that needs them."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import Cache, PixelStore, Split, pixels
from crosstill.evaluate import frozen_images, frozen_texts
from crosstill.students.student import Student, Tokens
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.sampler import Picked, Sampler
from crosstill.types import Features

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """One step's input. Student input is this process's share, teacher rows are the whole batch."""

    images: Tensor  # distinct images: uint8 (I, 3, H, W), or pooled (I, W) of a frozen tower
    image_of: Tensor  # (b,) row of `images` for each pair of the share
    texts: Tokens | Tensor  # of the share; pooled (b, W) for a frozen tower
    teacher: Features  # (B, D) each; a side that the teacher lacks is empty
    ids: Tensor  # (B,) int64 keys of the images
    picked: Picked
    views: int = 1  # of an image in the cache


class Stream:
    """The batches of one split for one student."""

    def __init__(
        self, cache: Cache, split: Split, student: Student, config: TrainConfig, group: Group
    ) -> None:
        self.cache, self.split, self.group = cache, split, group
        self.sampler = Sampler(
            split,
            config.batch_size,
            config.captions_per_image,
            config.seed,
            cache.views,
            config.steps_per_epoch,
        )
        self._student = student
        self._share = group.slice_of(config.batch_size)
        self._tokens = student.tokenize([cache.texts[row] for row in split.captions])
        self._photos: PixelStore | None = None
        self._pooled_images: Tensor | None = None
        self._pooled_texts: Tensor | None = None
        if config.freeze == "image":
            self._pooled_images = frozen_images(student, cache, split, cache.views)
        else:
            self._photos = pixels(cache, split, student.preprocess)
        if config.freeze == "text":
            self._pooled_texts = frozen_texts(student, cache, split)

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of one step: a pure function of its arguments."""
        picked = self.sampler.pick(epoch, step)
        rows = self.split.captions[picked.captions]
        images = self.split.images[picked.images]
        share = self._share
        seen = picked.images[share] * self.cache.views + picked.views[share]
        distinct, image_of = np.unique(seen, return_inverse=True)
        batch = Batch(
            images=self._image_input(distinct),
            image_of=torch.from_numpy(image_of),
            texts=self._text_input(picked.captions[share]),
            teacher=self._teacher(images, rows, picked.views),
            ids=self.cache.keys[torch.from_numpy(images)],
            picked=picked,
            views=self.cache.views,
        )
        return _to(batch, self.group.device)

    def ahead(self, epoch: int, first: int) -> Iterator[tuple[int, Batch, float]]:
        """(step, batch, seconds waited for it) from step `first` to the end of the epoch."""
        yield from ahead(self.batch, epoch, range(first, self.sampler.steps_per_epoch))

    def _image_input(self, seen: np.ndarray) -> Tensor:
        if self._pooled_images is not None:
            return self._pooled_images[torch.from_numpy(seen)]
        assert self._photos is not None
        return self._photos.take(seen // self.cache.views, seen % self.cache.views)

    def _text_input(self, captions: np.ndarray) -> Tokens | Tensor:
        if self._pooled_texts is not None:
            return self._pooled_texts[torch.from_numpy(captions)]
        return self._student.pad([self._tokens[row] for row in captions])

    def _teacher(self, images: np.ndarray, captions: np.ndarray, views: np.ndarray) -> Features:
        has = self.cache.modalities
        empty = torch.empty(0)
        image = self.cache.image_features(images, views) if "image" in has else empty
        return Features(image, self.cache.text_features(captions) if "text" in has else empty)


def ahead(
    make: Callable[[int, int], Made], epoch: int, steps: range
) -> Iterator[tuple[int, Made, float]]:
    """(step, batch, seconds waited for it): the next batch is made while one is in use."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(make, epoch, steps[0]) if steps else None
        for step in steps:
            assert pending is not None
            start = time.perf_counter()
            batch = pending.result()
            waited = time.perf_counter() - start
            if step + 1 in steps:
                pending = pool.submit(make, epoch, step + 1)
            yield step, batch, waited


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    texts = (
        Tokens(*(part.to(device) for part in batch.texts))
        if isinstance(batch.texts, Tokens)
        else batch.texts.to(device)
    )
    teacher = Features(*(side.to(device) for side in batch.teacher))
    return Batch(
        batch.images.to(device),
        batch.image_of.to(device),
        texts,
        teacher,
        batch.ids.to(device),
        batch.picked,
        batch.views,
    )
