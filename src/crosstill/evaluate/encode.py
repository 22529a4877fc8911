"""Embeddings of a whole split, from photos on disk or from what a cache has decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosstill import images, progress
from crosstill.cache import Cache, PixelStore, Split, derived, pixels
from crosstill.data import Pairs
from crosstill.errors import DataError, ImageError
from crosstill.evaluate.recall import Retrieval, retrieval
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher, embed_pixels
from crosstill.types import Example, Features

BATCH = 128  # rows per pass; no gradient is kept, so memory is small


@dataclass(frozen=True)
class Embedded:
    """A split as one model sees it."""

    image: Tensor  # (I, D) unit rows
    text: Tensor  # (T, D) unit rows
    owner: Tensor  # (T,) row of `image` that each caption belongs to
    image_ids: list[str]
    quarantine: images.Quarantine


def embed(model: Teacher, pairs: Pairs, strict: bool = False) -> Embedded:
    """Read, decode and embed every image and caption of a dataset.

    Raises:
        DataError: no image is readable.
        ImageError: an image is unreadable and `strict` is set.
    """
    quarantine = images.Quarantine(strict=strict)
    for row in pairs.quarantine.rows:
        quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
    kept, rows = _embed_images(model, pairs, quarantine)
    if not kept:
        raise DataError(f"{pairs.name}: all {len(pairs.examples)} images are unreadable")
    texts = [text for example in kept for text in example.captions]
    owner = [row for row, example in enumerate(kept) for _ in example.captions]
    ids = [example.image_id for example in kept]
    return Embedded(rows, embed_texts(model, texts), torch.tensor(owner), ids, quarantine)


def _embed_images(
    model: Teacher, pairs: Pairs, quarantine: images.Quarantine
) -> tuple[list[Example], Tensor]:
    def load(example: Example) -> Tensor | tuple[ImageError, int]:
        data = b""
        try:
            data = pairs.read(example)
            return images.load(data, example.path, model.preprocess)
        except ImageError as error:
            return error, len(data)

    kept: list[Example] = []
    rows: list[Tensor] = []
    examples = pairs.examples
    with ThreadPoolExecutor(max_workers=4) as pool, progress.bar("images", len(examples)) as bar:
        for start in range(0, len(examples), BATCH):
            chunk = examples[start : start + BATCH]
            good = []
            for example, loaded in zip(chunk, pool.map(load, chunk), strict=True):
                if isinstance(loaded, Tensor):
                    good.append(loaded)
                    kept.append(example)
                else:
                    quarantine.add(*loaded)
            rows += [model.embed_images(torch.stack(good)).cpu()] if good else []
            bar.advance(len(chunk))
    return kept, torch.cat(rows) if rows else torch.empty(0, model.dim)


def embed_texts(model: Teacher, texts: Sequence[str]) -> Tensor:
    """Unit rows (T, D); captions of one length share a pass, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    out = torch.empty(len(texts), model.dim)
    with progress.bar("captions", len(texts)) as bar:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            out[rows] = model.embed_texts([texts[row] for row in rows]).cpu()
            bar.advance(len(rows))
    return out


class CachedSplit:
    """A split of a cache, tokenized and decoded once: recall after every epoch.

    Args:
        cache: holds the photos.
        split: which of them.
        student: whose tokenizer and preprocess to use.
        frozen: the tower that will not change, if any: "image" or "text".
    """

    def __init__(self, cache: Cache, split: Split, student: Student, frozen: str = "none") -> None:
        self._cache, self._split = cache, split
        self._owner = torch.from_numpy(split.owner)
        self._images = frozen_images(student, cache, split) if frozen == "image" else None
        self._texts = frozen_texts(student, cache, split) if frozen == "text" else None
        if self._images is None:
            self._photos = pixels(cache, split, student.preprocess)
        if self._texts is None:
            self._tokens = student.tokenize([cache.texts[row] for row in split.captions])

    def recall(self, student: Student) -> Retrieval:
        """The student's recall on the plain photos of the split."""
        return retrieval(*self.features(student), self._owner)

    def features(self, student: Student) -> Features:
        """The student's unit rows (I, D) and (T, D) of the split."""
        with evaluating(student):
            images, texts = self._images, self._texts
            images = pool_images(student, self._photos) if images is None else images
            texts = pool_texts(student, self._tokens) if texts is None else texts
            image = student.embed_image(images.to(student.device))
            text = student.embed_text(texts.to(student.device))
            return Features(image.cpu(), text.cpu())

    @property
    def owner(self) -> Tensor:
        """(T,) the image of each caption."""
        return self._owner

    def teacher_recall(self) -> Retrieval | None:
        """The teacher's recall on the same rows; None if it left only one side."""
        return teacher_recall(self._cache, self._split)


def teacher_recall(cache: Cache, split: Split) -> Retrieval | None:
    """The recall of the features that a cache holds of a split."""
    if not {"image", "text"} <= cache.modalities:
        return None
    owner = torch.from_numpy(split.owner)
    return retrieval(cache.image_features(split.images), cache.text_features(split.captions), owner)


def frozen_images(student: Student, cache: Cache, split: Split, views: int = 1) -> Tensor:
    """`pool_images` of a tower that will not change: computed once for all runs with it."""
    name = f"pooled-{student.tower_digest('image')[:16]}-{views}-{split.name}"
    return derived.rows(
        cache,
        name,
        lambda: pool_images(student, pixels(cache, split, student.preprocess), views),
    )


def frozen_texts(student: Student, cache: Cache, split: Split) -> Tensor:
    """`pool_texts` of a tower that will not change: computed once for all runs with it."""
    texts = [cache.texts[row] for row in split.captions]
    name = f"pooled-{student.tower_digest('text')[:16]}-{split.name}"
    return derived.rows(cache, name, lambda: pool_texts(student, student.tokenize(texts)))


def pool_images(student: Student, store: PixelStore, views: int = 1) -> Tensor:
    """Pooled image states (I * views, W) of a whole split, image by image, view by view."""
    rows = np.arange(len(store) * views)
    out = []
    with evaluating(student), progress.bar("encoding images", len(rows)) as bar:
        for start in range(0, len(rows), BATCH):
            chunk = rows[start : start + BATCH]
            photos = store.take(chunk // views, chunk % views)
            out.append(embed_pixels(photos, student.pool_image, student.device))
            bar.advance(len(chunk))
    return torch.cat(out)


def pool_texts(student: Student, tokens: Sequence[list[int]]) -> Tensor:
    """Pooled text states (T, W) of tokenized captions, in their order."""
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    out: list[Tensor] = []
    with evaluating(student), progress.bar("encoding captions", len(order)) as bar:
        for start in range(0, len(order), BATCH):
            chunk = order[start : start + BATCH]
            batch = student.pad([tokens[row] for row in chunk])
            out.append(student.pool_text(*(part.to(student.device) for part in batch)))
            bar.advance(len(chunk))
    pooled = torch.cat(out)
    return torch.empty_like(pooled).index_copy_(
        0, torch.tensor(order, device=student.device), pooled
    )


@contextmanager
def evaluating(student: Student) -> Iterator[None]:
    """Evaluation mode without gradients; the student goes back to what it was."""
    training = student.training
    student.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        student.train(training)
