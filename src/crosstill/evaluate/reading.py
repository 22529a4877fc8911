"""The photos of a dataset, decoded as a model wants them, some at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from crosstill import decoding, images, progress
from crosstill.data import Pairs
from crosstill.errors import DataError, ImageError
from crosstill.images import Preprocess, Quarantine
from crosstill.types import Example

BATCH = 128  # rows per pass; no gradient is kept, so memory is small

Loaded = Tensor | images.Unreadable  # pixels uint8 (3, H, W), or what is wrong


def photos(pairs: Pairs, preprocess: Preprocess) -> Iterator[list[tuple[Example, Loaded]]]:
    """Every example with its uint8 pixels (3, H, W), `BATCH` at a time, in order."""

    def load(example: Example) -> Loaded:
        return images.try_load(
            pairs.read, example, lambda file: images.load(file, example.path, preprocess)
        )

    return decoding.batches(load, pairs.examples, BATCH)


def sound(pairs: Pairs, preprocess: Preprocess) -> Iterator[list[Tensor]]:
    """As `photos`, of images that were found `readable` before.

    Raises:
        ImageError: an image has become unreadable since.
    """
    for chunk in photos(pairs, preprocess):
        for _, loaded in chunk:
            if isinstance(loaded, images.Unreadable):
                raise loaded.error
        yield [loaded for _, loaded in chunk if isinstance(loaded, Tensor)]


def readable(pairs: Pairs, preprocesses: Iterable[Preprocess], strict: bool = False) -> Pairs:
    """The images that all of several models can read; the others go into the quarantine.

    Raises:
        DataError: no image is readable.
        ImageError: an image is unreadable and `strict` is set.
    """
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
    """A quarantine that begins with what the dataset could not use.

    Raises:
        ImageError: there is such an image and `strict` is set.
    """
    quarantine = Quarantine(strict=strict)
    for row in pairs.quarantine.rows:
        quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
    return quarantine


def captions(examples: Iterable[Example]) -> tuple[list[str], Tensor]:
    """All captions, and the row of the image that each describes: T texts, (T,) int64."""
    rows = [(row, text) for row, example in enumerate(examples) for text in example.captions]
    return [text for _, text in rows], torch.tensor([row for row, _ in rows], dtype=torch.int64)
