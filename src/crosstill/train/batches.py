"""Draw the pairs of each step, and make them tensors one step ahead.

Which pairs a step sees is a pure function of (seed, epoch, step): nothing is skipped to resume and
nothing depends on workers or processes.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import Cache, PixelStore, Split, pixels
from crosstill.errors import ConfigError
from crosstill.evaluate import frozen_images, frozen_texts
from crosstill.students.student import Student, Tokens
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.types import Features

Made = TypeVar("Made")


@dataclass(frozen=True)
class Picked:
    """The rows of one batch, as positions in the split."""

    captions: np.ndarray  # (B,)
    images: np.ndarray  # (B,) the image of each caption
    views: np.ndarray  # (B,) which view of that image


class Sampler:
    """Every caption once an epoch, in groups of `captions_per_image` captions of one image.

    Photos without captions and loose texts are not drawn. With `steps`, an epoch ends after so many
    of its steps; the next one draws anew. Without `shuffle` it goes on from there, in the order of
    the data.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        captions_per_image: int,
        seed: int,
        views: int = 1,
        steps: int | None = None,
        shuffle: bool = True,
    ) -> None:
        pairs = split.pairs
        if batch_size > pairs:
            raise ConfigError(
                f"batch_size = {batch_size} is more than the {pairs} pairs of split "
                f"{split.name!r}; use --set batch_size={pairs}"
            )
        whole = pairs // batch_size  # the odd rest waits for another epoch's order
        self.steps_per_epoch = min(steps or whole, whole)
        self._split, self._size, self._group = split, batch_size, captions_per_image
        self._owner = split.owner[:pairs]
        self._seed, self._views, self._shuffle = seed, views, shuffle
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def pick(self, epoch: int, step: int) -> Picked:
        """Return the rows of one step of one epoch."""
        order, views = self._epoch(epoch)
        captions = order[step * self._size : (step + 1) * self._size]
        images = self._owner[captions]
        return Picked(captions, images, views[images])

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw all captions in this epoch's order, and this epoch's view of each image."""
        random = np.random.default_rng([self._seed, epoch])
        shuffled = random.permutation(len(self._owner))
        by_image = shuffled[np.argsort(self._owner[shuffled], kind="stable")]
        owner = self._owner[by_image]
        starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        within = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
        # captions of one group share one random key and so stay together
        opens = within % self._group == 0
        group = np.cumsum(opens) - 1
        key = random.permutation(int(opens.sum()))[group]
        views = random.integers(self._views, size=len(self._split.images))
        if not self._shuffle:
            whole = len(by_image) // self._size * self._size
            return np.roll(np.arange(whole), -epoch * self.steps_per_epoch * self._size), views
        return by_image[np.argsort(key, kind="stable")], views


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
            config.shuffle,
        )
        self._student, self._raw = student, reads_raw(cache, config)
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
        """Make the batch of one step: a pure function of its arguments."""
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
        """Yield (step, batch, seconds waited for it) from step `first` to the end of the epoch."""
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
        cache, raw = self.cache, self._raw
        image = cache.image_features(images, views, raw) if "image" in has else empty
        return Features(image, cache.text_features(captions, raw) if "text" in has else empty)


def reads_raw(cache: Cache, config: TrainConfig) -> bool:
    """Tell whether losses see the teacher's rows as long as it gave them."""
    return config.normalise is False and cache.raw


def ahead(
    make: Callable[[int, int], Made], epoch: int, steps: range
) -> Iterator[tuple[int, Made, float]]:
    """Yield (step, batch, seconds waited for it): the next batch is made while one is in use."""
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
