"""Draw the photos and texts of each step, and make them tensors one step ahead.

Which rows a step sees is a pure function of (seed, epoch, step): nothing is skipped to resume and
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

from crosstill.cache import Cache, CacheBase, PixelStore, Split, pixels
from crosstill.errors import ConfigError
from crosstill.evaluate import TokenRows, settled_images, settled_texts
from crosstill.students.student import Student, Tokens
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.types import Features, Ids, text_key

Made = TypeVar("Made")


@dataclass(frozen=True)
class Picked:
    """The rows of one batch, as positions in the split; the first `paired` of both are pairs."""

    captions: np.ndarray  # (Bt,)
    images: np.ndarray  # (Bv,) the image of each caption, then photos that belong to no text here
    views: np.ndarray  # (Bv,) which view of that image
    paired: int


class Passes:
    """Rows of a table in a new order at every pass, a number of them at each step.

    Args:
        draw: (epoch, pass) → all rows in an order of their own (N, ...).
        count: N.
        each: rows of a step.
    """

    def __init__(self, draw: Callable[[int, int], np.ndarray], count: int, each: int) -> None:
        self._order = lru_cache(maxsize=2)(draw)
        self._count, self._each = count, each
        self.steps = count // each  # of one pass; the odd rest waits for another order

    def take(self, epoch: int, step: int) -> np.ndarray:
        """Return the rows of one step; after the last row the next pass begins."""
        first, stop = step * self._each, (step + 1) * self._each
        parts = []
        while first < stop:
            number, start = divmod(first, self._count)
            parts.append(self._order(epoch, number)[start : start + stop - first])
            first += len(parts[-1])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Sampler:
    """Rows of every step: pairs, then photos and texts that belong to none.

    Where every photo has captions and every text a photo, a batch is pairs alone: every caption
    once an epoch, in groups of `captions_per_image` captions of one image. Else a share of the
    batch is pairs, and the rest as many photos without captions and as many texts without photos;
    where the split has fewer of these than that, they are drawn from all photos or texts. An epoch
    passes once over whichever of the three takes longest, and the others start over in a new
    order. With `steps`, it ends after so many of its steps; the next one draws anew. Without
    `shuffle` the captions go on from there, in the order of the data.

    Args:
        split: the rows to draw from.
        batch_size: photos of a batch, and texts.
        captions_per_image: captions of one image in a batch, among its pairs.
        seed: of all orders.
        views: of an image.
        steps: of an epoch, at most.
        shuffle: whether captions of photos come in a random order.
        share: of pairs in a batch; None is half, or more where more of the rows are pairs.

    Attributes:
        paired: pairs in a batch.

    Raises:
        ConfigError: a batch has more rows than there are, or a share of pairs and no pairs.
    """

    def __init__(  # noqa: PLR0913  (every setting of a batch is an argument)
        self,
        split: Split,
        batch_size: int,
        captions_per_image: int,
        seed: int,
        views: int = 1,
        steps: int | None = None,
        shuffle: bool = True,
        share: float | None = None,
    ) -> None:
        self._split, self._group = split, captions_per_image
        self._seed, self._views, self._shuffle = seed, views, shuffle
        self._pairs = split.pairs
        self.paired = _paired(split, batch_size, share)
        each = batch_size - self.paired
        photos, texts = np.arange(len(split.images)), np.arange(len(split.captions))
        _check_size(split, batch_size, self.paired)
        bare, loose = np.delete(photos, split.captioned), texts[self._pairs :]
        self._photos = photos if len(bare) < each else bare
        self._texts = texts if len(loose) < each else loose
        # in the data's order the odd rest is left out
        pairs = self._pairs if shuffle else self._pairs - self._pairs % (self.paired or 1)
        self._streams = {
            name: Passes(draw, count, rows)
            for name, draw, count, rows in (
                ("pairs", self._draw_pairs, pairs, self.paired),
                ("photos", self._draw_photos, len(self._photos), each),
                ("texts", self._draw_texts, len(self._texts), each),
            )
            if count and rows
        }
        whole = max(stream.steps for stream in self._streams.values())
        self.steps_per_epoch = min(steps or whole, whole)

    def pick(self, epoch: int, step: int) -> Picked:
        """Return the rows of one step of one epoch."""
        rows = {name: stream.take(epoch, step) for name, stream in self._streams.items()}
        pairs, photos = (rows.get(name, np.empty((0, 2), int)) for name in ("pairs", "photos"))
        captions, texts = pairs[:, 0], rows.get("texts", np.empty(0, int))
        return Picked(
            captions=np.append(captions, texts),
            images=np.append(self._split.owner[captions], photos[:, 0]),
            views=np.append(pairs[:, 1], photos[:, 1]),
            paired=self.paired,
        )

    def _draw_pairs(self, epoch: int, number: int) -> np.ndarray:
        """Draw all captions with a photo in the order of a pass: each, and the view of its image.

        An image has one view in a pass.
        """
        # a list of seeds that ends in 0 is the same as without it
        random = np.random.default_rng([self._seed, epoch, number])
        owners = self._split.owner[: self._pairs]
        shuffled = random.permutation(self._pairs)
        by_image = shuffled[np.argsort(owners[shuffled], kind="stable")]
        owner = owners[by_image]
        starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        within = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
        # captions of one group share one random key and so stay together
        opens = within % self._group == 0
        group = np.cumsum(opens) - 1
        key = random.permutation(int(opens.sum()))[group]
        views = random.integers(self._views, size=len(self._split.images))
        order = by_image[np.argsort(key, kind="stable")]
        if not self._shuffle:
            whole = self._pairs - self._pairs % self.paired
            order = np.roll(np.arange(whole), -epoch * self.steps_per_epoch * self.paired)
        return np.stack([order, views[owners[order]]], axis=1)

    def _draw_photos(self, epoch: int, number: int) -> np.ndarray:
        """Draw the photos that stand beside the pairs in the order of a pass, with their views."""
        random = np.random.default_rng([self._seed, epoch, number, 1])
        order = random.permutation(self._photos)
        return np.stack([order, random.integers(self._views, size=len(order))], axis=1)

    def _draw_texts(self, epoch: int, number: int) -> np.ndarray:
        """Draw the texts that stand beside the pairs in the order of a pass."""
        return np.random.default_rng([self._seed, epoch, number, 2]).permutation(self._texts)


def _paired(split: Split, batch_size: int, share: float | None) -> int:
    """Compute how many pairs a batch has."""
    pairs = split.pairs
    bare, loose = len(split.images) - len(split.captioned), len(split.captions) - pairs
    if share and not pairs:
        raise ConfigError(
            f"paired_share = {share}: split {split.name!r} has no photo with a caption; "
            "leave it out"
        )
    if share is None:
        others = max(bare, loose)
        share = max(0.5, pairs / (pairs + others)) if pairs else 0.0
    if share == 1:
        return batch_size
    return min(round(share * batch_size), pairs, batch_size - 1)


def _check_size(split: Split, batch_size: int, paired: int) -> None:
    """Refuse a batch that is larger than what it is drawn from."""
    there = {"pairs": (split.pairs, paired)}
    if paired < batch_size:
        each = batch_size - paired
        there |= {"photos": (len(split.images), each), "texts": (len(split.captions), each)}
    for what, (count, taken) in there.items():
        if count and taken > count:
            beside = "" if taken == batch_size else f" takes {taken} beside its pairs, which"
            raise ConfigError(
                f"batch_size = {batch_size}{beside} is more than the {count} {what} of split "
                f"{split.name!r}; use --set batch_size={count}"
            )


@dataclass(frozen=True)
class Batch:
    """One step's input. Student input is this process's share, teacher rows are the whole batch."""

    images: Tensor  # distinct images: uint8 (I, 3, H, W), or pooled (I, W) of a frozen tower
    image_of: Tensor  # (b,) row of `images` for each photo of the share
    texts: Tokens | Tensor  # of the share; pooled (b, W) for a frozen tower
    teacher: Features  # (B, D) each; a side that the teacher lacks is empty
    ids: Ids  # keys of the images, and of texts without one
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
            config.paired_share,
        )
        self._student, self._raw = student, reads_raw(cache, config)
        self._share = group.slice_of(config.batch_size)
        self._photos: PixelStore | None = None
        self._tokens: TokenRows | None = None
        self._pooled_images = settled_images(student, cache, split, config.freeze, cache.views)
        self._pooled_texts = settled_texts(student, cache, split, config.freeze)
        if self._pooled_images is None:
            self._photos = pixels(cache, split, student.preprocess)
        if self._pooled_texts is None:
            self._tokens = TokenRows(student, cache, split)

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
            ids=Ids(self.cache.keys[torch.from_numpy(images)], self._text_ids(rows), picked.paired),
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
        assert self._tokens is not None
        return self._student.pad([self._tokens[row] for row in captions])

    def _text_ids(self, rows: np.ndarray) -> Tensor:
        """Return the key of each text's image, and of a text without one its own."""
        owners = self.cache.owner[rows].astype(np.int64)
        keys = torch.empty(len(rows), dtype=torch.int64)
        described = torch.from_numpy(owners >= 0)
        keys[described] = self.cache.keys[torch.from_numpy(owners[owners >= 0])]
        for place in np.flatnonzero(owners < 0):
            keys[place] = text_key(self.cache.texts[rows[place]])
        return keys

    def _teacher(self, images: np.ndarray, captions: np.ndarray, views: np.ndarray) -> Features:
        has = self.cache.modalities
        empty = torch.empty(0)
        cache, raw = self.cache, self._raw
        image = cache.image_features(images, views, raw) if "image" in has else empty
        return Features(image, cache.text_features(captions, raw) if "text" in has else empty)


def reads_raw(cache: CacheBase, config: TrainConfig) -> bool:
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
        Ids(batch.ids.image.to(device), batch.ids.text.to(device), batch.ids.paired),
        batch.picked,
        batch.views,
    )
