"""Embeddings of a whole split, from photos on disk or from what a cache has decoded."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstill import decoding, images, progress
from crosstill.cache import CacheBase, PixelStore, Split, memo, pixels
from crosstill.data import Pairs
from crosstill.errors import DataError, ImageError, ModelError
from crosstill.evaluate import truth as truths
from crosstill.evaluate.bootstrap import Answers
from crosstill.evaluate.likeness import mean_cosines
from crosstill.evaluate.recall import Ranking, Retrieval, chances, retrieval
from crosstill.images import Preprocess, Quarantine
from crosstill.students.student import Student
from crosstill.teachers import base
from crosstill.types import Example, Features

BATCH = 128  # rows per pass; no gradient is kept, so memory is small
TOKENIZED = 10_000  # texts tokenized together

Loaded = Tensor | images.Unreadable  # pixels uint8 (3, H, W), or what is wrong


@dataclass(frozen=True)
class Embedded:
    """A split as one model sees it."""

    image: Tensor  # (I, D) unit rows
    text: Tensor  # (T, D) unit rows
    truth: truths.Truth  # which rows belong together
    image_ids: list[str]
    quarantine: Quarantine

    @property
    def owner(self) -> Tensor:
        """(T,) row of `image` that each caption was written for."""
        return self.truth.owner


@dataclass(frozen=True)
class Measured:
    """Hold the figures of one validation.

    Attributes:
        recall: of the student.
        cosines: mean cosines between its rows by side, see `crosstill.evaluate.likeness`; empty of
            a model without rows.
    """

    recall: Ranking
    cosines: dict[str, float]


class Stopwatch:
    """Adds up the seconds of pieces of work, on a GPU to their end."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the block takes."""
        _finish_on_gpu()
        start = time.perf_counter()
        try:
            yield
        finally:
            _finish_on_gpu()
            self.seconds += time.perf_counter() - start


def _finish_on_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def embed(
    model: base.Teacher, pairs: Pairs, strict: bool = False, watch: Stopwatch | None = None
) -> Embedded:
    """Read, decode and embed every caption of a dataset, and every image that has one.

    Args:
        model: what embeds.
        pairs: the dataset, usually one split of it.
        strict: raise at the first image that cannot be read instead of setting it apart.
        watch: adds up the seconds of the model alone, without reading and decoding.

    Raises:
        DataError: no image is readable, or none has a caption.
        ImageError: an image is unreadable and `strict` is set.
        ModelError: the model scores pairs, or is a folder of vectors.
    """
    kind = base.kind_of(model)
    if kind == "vectors":
        raise ModelError(f"{model.source} holds vectors and cannot embed new images; use a model")
    if kind != "encoder":
        raise ModelError(f"{model.name}: a fusion model, which reads pairs and has no embeddings")
    pairs = pairs.captioned()
    quarantine, watch = quarantined(pairs, strict), watch or Stopwatch()
    kept, rows = _embed_images(model, pairs, quarantine, watch)
    if not kept:
        raise DataError(f"{pairs.name}: all {len(pairs.examples)} images are unreadable")
    texts, owner = captions(kept)
    with watch.running():
        text = embed_texts(model, texts)
    truth = truths.of_texts(owner, texts)
    return Embedded(rows, text, truth, [example.image_id for example in kept], quarantine)


def _embed_images(
    model: base.Teacher, pairs: Pairs, quarantine: Quarantine, watch: Stopwatch
) -> tuple[list[Example], Tensor]:
    kept: list[Example] = []
    rows: list[Tensor] = []
    with progress.bar("images", len(pairs.examples)) as bar:
        for chunk in photos(pairs, model.preprocess):
            good = []
            for example, loaded in chunk:
                if isinstance(loaded, Tensor):
                    good.append(loaded)
                    kept.append(example)
                else:
                    quarantine.add(*loaded)
            with watch.running():
                rows += [model.embed_images(torch.stack(good)).cpu()] if good else []
            bar.advance(len(chunk))
    return kept, torch.cat(rows) if rows else torch.empty(0, model.dim)


def embed_texts(model: base.Teacher, texts: Sequence[str]) -> Tensor:
    """Embed captions: unit rows (T, D); those of one length share a pass, without padding."""
    if not texts:
        return torch.empty(0, model.dim)
    with progress.bar("captions", len(texts)) as bar:
        return base.embed_by_length(texts, lambda some: model.embed_texts(some).cpu(), BATCH, bar)


class CachedSplit:
    """A split of a cache, tokenized and decoded once: recall after every epoch.

    Args:
        cache: holds the photos.
        split: which of them.
        student: whose tokenizer and preprocess to use.
        frozen: the tower that will not change, if any: "image" or "text".

    Attributes:
        split: as it is looked at.
        truth: which captioned images and captions of the split belong together.
        owner: (T,) position of each text's image in the split, -1 of a loose text.
        caveat: see `crosstill.train.task.Validation`.
    """

    caveat = ""

    def __init__(
        self, cache: CacheBase, split: Split, student: Student, frozen: str = "none"
    ) -> None:
        self._cache, self.split = cache, split
        self.truth = cached_truth(cache, split)
        self.owner = torch.from_numpy(split.owner)
        self._images = settled_images(student, cache, split, frozen)
        self._texts = settled_texts(student, cache, split, frozen)
        if self._images is None:
            self._photos = pixels(cache, split, student.preprocess)
        if self._texts is None:
            self._tokens = TokenRows(student, cache, split)

    def recall(self, student: Student) -> Ranking:
        """Measure the student on the plain photos of the split."""
        return self.rank(self.features(student))

    def measure(self, student: Student) -> Measured:
        """Measure how the student ranks, and how alike all its rows are."""
        features = self.features(student)
        return Measured(self.rank(features), self.cosines(features))

    def rank(self, features: Features) -> Ranking:
        """Measure the recall of a model's rows of the split, among photos that have captions."""
        return retrieval(*self.paired(features), self.truth)

    def cosines(self, features: Features) -> dict[str, float]:
        """Compute the mean cosines of rows of the whole split."""
        return mean_cosines(features._asdict(), self.owner)

    def answers(self, student: Student) -> Answers:
        """Compute the chance of each query to be answered, for a paired bootstrap."""
        rows = self.paired(self.features(student))
        return Answers(*chances(*rows, self.truth), self.truth.owner)

    def paired(self, features: Features) -> Features:
        """Take the rows of captioned photos and of captions from those of the whole split."""
        split = self.split
        return Features(
            features.image[torch.from_numpy(split.captioned)], features.text[: split.pairs]
        )

    def features(self, student: Student) -> Features:
        """Embed the whole split with the student: unit rows (I, D) and (T, D)."""
        with base.evaluating(student):
            images, texts = self._images, self._texts
            images = pool_images(student, self._photos) if images is None else images
            texts = pool_texts(student, self._tokens) if texts is None else texts
            image = student.embed_image(images.to(student.device))
            text = student.embed_text(texts.to(student.device))
            return Features(image.cpu(), text.cpu())

    def teacher_recall(self) -> Retrieval | None:
        """Measure the teacher's recall on the same rows; None if the cache has only one side."""
        return teacher_recall(self._cache, self.split)

    def teacher_cosines(self) -> dict[str, float]:
        """Compute the teacher's mean cosines on the same rows; no sides that the cache lacks."""
        return mean_cosines(teacher_rows(self._cache, self.split), self.owner)


def teacher_rows(cache: CacheBase, split: Split) -> dict[str, Tensor]:
    """Read the rows of a split that a student is compared with: of photos, captions or both."""
    return cache.split_sides(split)


def teacher_recall(cache: CacheBase, split: Split) -> Retrieval | None:
    """Measure the recall of a cache's features of a split; None if it has only one side."""
    features: Features | None = cache.plain.split_features(split.paired())
    return None if features is None else retrieval(*features, cached_truth(cache, split))


def cached_truth(cache: CacheBase, split: Split) -> truths.Truth:
    """Return which captioned images and captions of a split of a cache belong together."""
    split = split.paired()
    texts = [cache.texts[row] for row in split.captions]
    return truths.of_texts(torch.from_numpy(split.owner), texts)


def settled_images(
    student: Student, cache: CacheBase, split: Split, frozen: str, views: int = 1
) -> Tensor | None:
    """Return what the image tower makes of a split, if that never changes: (I * views, W).

    It does not where the tower is the `frozen` one, or where there are no photos.
    """
    if not len(split.images):
        return torch.empty(0, student.image_head.in_features)
    return frozen_images(student, cache, split, views) if frozen in ("image", "both") else None


def settled_texts(student: Student, cache: CacheBase, split: Split, frozen: str) -> Tensor | None:
    """As `settled_images`, of the texts: (T, W)."""
    if not len(split.captions):
        return torch.empty(0, student.text_head.in_features)
    return frozen_texts(student, cache, split) if frozen in ("text", "both") else None


def frozen_images(student: Student, cache: CacheBase, split: Split, views: int = 1) -> Tensor:
    """Compute `pool_images` of a frozen tower, once for all runs with it."""
    name = f"pooled-{student.tower_digest('image')[:16]}-{views}-{split.name}"
    return memo.memoised_tensor(
        cache,
        name,
        lambda: pool_images(student, pixels(cache, split, student.preprocess), views),
    )


def frozen_texts(student: Student, cache: CacheBase, split: Split) -> Tensor:
    """Compute `pool_texts` of a frozen tower, once for all runs with it."""
    name = f"pooled-{student.tower_digest('text')[:16]}-{split.name}"
    return memo.memoised_tensor(
        cache, name, lambda: pool_texts(student, TokenRows(student, cache, split))
    )


class TokenRows(Sequence[list[int]]):
    """The token ids of each text of a split, in one array: a million lists would take gigabytes."""

    def __init__(self, student: Student, cache: CacheBase, split: Split) -> None:
        parts, lengths = [np.empty(0, np.int32)], [0]
        for start in range(0, len(split.captions), TOKENIZED):
            some = split.captions[start : start + TOKENIZED]
            rows = student.tokenize([cache.texts[row] for row in some])
            parts.append(np.array([token for row in rows for token in row], np.int32))
            lengths += map(len, rows)
        self._ids, self._ends = np.concatenate(parts), np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: Any) -> Any:
        return self._ids[self._ends[row] : self._ends[row + 1]].tolist()


def pool_images(student: Student, store: PixelStore, views: int = 1) -> Tensor:
    """Pool a whole split's images (I * views, W), image by image, view by view."""
    rows = np.arange(len(store) * views)
    out = []
    with base.evaluating(student), progress.bar("encoding images", len(rows)) as bar:
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            photos = store.take(chunk // views, chunk % views)
            out.append(base.embed_pixels(photos, student.pool_image, student.device))
            bar.advance(len(chunk))
    return torch.cat(out)


def pool_texts(student: Student, tokens: Sequence[list[int]]) -> Tensor:
    """Pool tokenized captions (T, W), in their order."""
    with base.evaluating(student), progress.bar("encoding captions", len(tokens)) as bar:

        def pool(rows: list[int]) -> Tensor:
            batch = student.pad([tokens[row] for row in rows])
            pooled = student.pool_text(*(part.to(student.device) for part in batch))
            bar.advance(len(rows))
            return pooled

        return base.encode_by_length(map(len, tokens), pool, BATCH)


def photos(pairs: Pairs, preprocess: Preprocess) -> Iterator[list[tuple[Example, Loaded]]]:
    """Decode every example to uint8 pixels (3, H, W), `BATCH` at a time, in order."""

    def load(example: Example) -> Loaded:
        return images.try_load(
            pairs.read, example, lambda file: images.load(file, example.path, preprocess)
        )

    return decoding.batches(load, pairs.examples, BATCH)


def sound(pairs: Pairs, preprocess: Preprocess) -> Iterator[list[Tensor]]:
    """Decode images that were found `readable` before, `BATCH` at a time.

    Raises:
        ImageError: an image has become unreadable since.
    """
    for chunk in photos(pairs, preprocess):
        for _, loaded in chunk:
            if isinstance(loaded, images.Unreadable):
                raise loaded.error
        yield [loaded for _, loaded in chunk if isinstance(loaded, Tensor)]


def readable(pairs: Pairs, preprocesses: Iterable[Preprocess], strict: bool = False) -> Pairs:
    """Keep the captioned images that all of several models can read; quarantine unreadable ones.

    Raises:
        DataError: no image is readable, or none has a caption.
        ImageError: an image is unreadable and `strict` is set.
    """
    pairs = pairs.captioned()
    quarantine, listed = quarantined(pairs, strict), len(pairs.examples)
    for preprocess in dict.fromkeys(preprocesses):
        kept = []
        with progress.bar("checking images", len(pairs.examples)) as bar:
            for chunk in photos(pairs, preprocess):
                for example, loaded in chunk:
                    if isinstance(loaded, Tensor):
                        kept.append(example)
                    else:
                        quarantine.add(*loaded)
                bar.advance(len(chunk))
        pairs = replace(pairs, examples=tuple(kept))
    if not pairs.examples:
        raise DataError(f"{pairs.name}: all {listed} images are unreadable")
    return replace(pairs, quarantine=quarantine)


def quarantined(pairs: Pairs, strict: bool) -> Quarantine:
    """Make a quarantine that begins with what the dataset could not use.

    Raises:
        ImageError: there is such an image and `strict` is set.
    """
    quarantine = Quarantine(strict=strict)
    for row in pairs.quarantine.rows:
        quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
    return quarantine


def captions(examples: Iterable[Example]) -> tuple[list[str], Tensor]:
    """List all captions, and the row of the image that each describes: T texts, (T,) int64."""
    rows = [(row, text) for row, example in enumerate(examples) for text in example.captions]
    return [text for _, text in rows], torch.tensor([row for row, _ in rows], dtype=torch.int64)
