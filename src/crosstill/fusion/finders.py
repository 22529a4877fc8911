"""Finders of false candidates: a seed, or a dual encoder whose highest cosines are taken."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstill import decoding, images, progress
from crosstill.cache import Cache, is_cache
from crosstill.data import Pairs
from crosstill.errors import ConfigError, MismatchError, unknown
from crosstill.fusion import candidates
from crosstill.models import open as open_model
from crosstill.teachers.base import Teacher, embed_by_length
from crosstill.teachers.features import FeaturesTeacher
from crosstill.types import Example

BATCH = 64  # images or texts in one pass

Finder = str | Cache | Teacher


def opened(find: str | Path | Finder) -> Finder:
    """Open a finder that is given by name: a way to draw, a cache of features, or a model.

    Raises:
        ConfigError: a mistyped way to draw.
        ModelError: no model, or none that embeds.
    """
    if not isinstance(find, str | Path) or find in candidates.FINDERS:
        return find
    if is_cache(find):
        return Cache(find)
    if not Path(find).exists() and get_close_matches(str(find), candidates.FINDERS, n=1):
        raise unknown("candidate finder", str(find), candidates.FINDERS)
    return open_model(find, "encoder")


def check(find: Finder, pairs: Pairs) -> None:
    """Refuse a finder that cannot find candidates, before any work is done.

    Raises:
        ConfigError: a model without features, or features of one side only.
        MismatchError: a cache of another dataset.
    """
    if isinstance(find, str):
        return
    if isinstance(find, FeaturesTeacher) or not isinstance(find, Cache | Teacher):
        name = getattr(find, "name", None) or getattr(find, "folder", type(find).__name__)
        raise ConfigError(
            f"find = {name}: cannot find candidates; give random, batch, a dual encoder, or a "
            "cache of its features"
        )
    if find.modalities != {"image", "text"}:
        name = find.folder if isinstance(find, Cache) else find.name
        left = " and ".join(sorted(find.modalities)) or "no"
        raise ConfigError(f"find = {name}: has {left} features, and image and text are needed")
    if isinstance(find, Cache):
        image_ids = set(find.image_ids)
        lacking = [e for e in pairs.examples if e.image_id not in image_ids]
        if len(lacking) > find.header["quarantined"]:
            raise _of_other_data(find, lacking[0])


def identity(find: Finder) -> str | dict[str, Any]:
    """Return the part of a cache's key that identifies a finder."""
    if isinstance(find, str):
        return find
    return {"cache": find.digest} if isinstance(find, Cache) else {"model": find.identity()}


def rated(
    find: Finder, examples: Sequence[Example], pairs: Pairs, texts: Sequence[str], names: np.ndarray
) -> str | candidates.Rated:
    """Return a finder as `candidates.choose` takes it, its features computed.

    Args:
        find: as `check` let it pass.
        examples: the images, whose captions are texts[names].
        pairs: where their bytes are.
        texts: all distinct captions.
        names: (T,) which of `texts` each caption is.

    Raises:
        MismatchError: a cache that lacks an image or a caption.
    """
    if isinstance(find, str):
        return find
    if isinstance(find, Cache):
        return _cached(find, examples)
    with progress.bar("finder's captions", len(texts)) as bar:
        text = embed_by_length(texts, lambda some: find.embed_texts(some).cpu(), BATCH, bar)
    return candidates.Rated(_images(find, examples, pairs).numpy(), text.numpy()[names])


def _images(find: Teacher, examples: Sequence[Example], pairs: Pairs) -> Tensor:
    """Embed photos → (I, D)."""

    def load(example: Example) -> Tensor:
        return images.load(pairs.read(example), example.path, find.preprocess)

    rows = []
    with progress.bar("finder's images", len(examples)) as bar:
        for batch in decoding.batches(load, examples, BATCH):
            rows.append(find.embed_images(torch.stack([photo for _, photo in batch])).cpu())
            bar.advance(len(batch))
    return torch.cat(rows)


def _cached(find: Cache, examples: Sequence[Example]) -> candidates.Rated:
    """Read the features of images and captions, wherever they are in the cache."""
    image = {key: row for row, key in enumerate(find.image_ids)}
    text = {pair: row for row, pair in enumerate(zip(find.owner.tolist(), find.texts, strict=True))}
    images, texts = [], []
    for example in examples:
        row = image.get(example.image_id)
        captions = [text.get((row, caption)) for caption in example.captions]
        if row is None or None in captions:
            raise _of_other_data(find, example)
        images.append(row)
        texts += captions
    return candidates.Rated(
        find.image_features(np.array(images)).numpy(), find.text_features(np.array(texts)).numpy()
    )


def _of_other_data(find: Cache, example: Example) -> MismatchError:
    return MismatchError(
        f"find = {find.folder}: a cache of other data, {example.path} with its captions is not in "
        "it; make a cache of the same data"
    )
