"""Choose the pairs that a fusion teacher scores: all true ones, and some false ones.

Every image gets some captions of other images, and every caption some other images, within its
split. A caption whose text is also one of the image's own is never false for that image.

    random   drawn without preference
    batch    the other images of a batch and one caption of each, as in-batch negatives are
    top      the highest cosines of a dual encoder, or of a cache of its features

Rows are in the order of the ids, so the ids and the seed alone decide what is drawn.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from crosstill import decoding, images, progress
from crosstill.cache import Cache, is_cache
from crosstill.data import Pairs
from crosstill.errors import ConfigError, MismatchError, unknown
from crosstill.models import open as open_model
from crosstill.teachers.base import Teacher, embed_by_length
from crosstill.teachers.features import FeaturesTeacher
from crosstill.types import Example

FINDERS = ("random", "batch")
ENTRIES = 2**23  # of a table of queries and partners that is held at a time
BATCH = 64  # images or texts of a finder in one pass
_SURE = 2.0  # the preference of what is certainly taken; drawn ones have 0 to 1

Finder = str | Cache | Teacher


class Rows(NamedTuple):
    """All rows of a dataset, to choose from; captions are in the order of their images."""

    owner: np.ndarray  # (T,) image of each caption
    names: np.ndarray  # (T,) number of each caption's text: equal texts have equal numbers
    splits: np.ndarray  # (I,) split of each image


class Wanted(NamedTuple):
    """Numbers of false candidates to find."""

    false: int  # captions of each image
    false_images: int  # images of each caption
    seed: int = 0


class Rated(NamedTuple):
    """A dual encoder's features of all rows."""

    image: np.ndarray  # (I, D)
    text: np.ndarray  # (T, D)


def choose(rows: Rows, wanted: Wanted, find: str | Rated) -> tuple[np.ndarray, np.ndarray]:
    """Choose all pairs to score, each once: captions by image, as compressed sparse rows.

    There are fewer than wanted where a split has no more.

    Args:
        rows: of all splits.
        wanted: how many.
        find: one of `FINDERS`, or features whose highest cosines are taken.

    Returns:
        indptr (I + 1,) int64 and captions (P,) int32: those of image i are
        captions[indptr[i] : indptr[i + 1]], ascending.
    """
    total = len(rows.owner)
    keys = [rows.owner.astype(np.int64) * total + np.arange(total)]
    for split in sorted(set(rows.splits)):
        images = np.flatnonzero(rows.splits == split)
        captions = np.flatnonzero(rows.splits[rows.owner] == split)
        for image, caption in _of_split(rows, images, captions, wanted, find):
            keys.append(images[image] * total + captions[caption])
    image, caption = np.divmod(np.unique(np.concatenate(keys)), total)
    counts = np.bincount(image, minlength=len(rows.splits))
    return np.concatenate([[0], counts.cumsum()]).astype(np.int64), caption.astype(np.int32)


def numbered(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Number texts: the distinct ones in order of appearance, and the number of each text (T,)."""
    numbers: dict[str, int] = {}
    names = np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)
    return list(numbers), names


def open_finder(find: str | Path | Finder) -> Finder:
    """Open a finder that is given by name: a way to draw, a cache of features, or a model.

    Raises:
        ConfigError: a mistyped way to draw.
        ModelError: no model, or none that embeds.
    """
    if not isinstance(find, str | Path) or find in FINDERS:
        return find
    if is_cache(find):
        return Cache(find)
    if not Path(find).exists() and get_close_matches(str(find), FINDERS, n=1):
        raise unknown("candidate finder", str(find), FINDERS)
    return open_model(find, "encoder")


def check_finder(find: Finder, pairs: Pairs) -> None:
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


def finder_identity(find: Finder) -> str | dict[str, Any]:
    """Return the part of a cache's key that identifies a finder."""
    if isinstance(find, str):
        return find
    return {"cache": find.digest} if isinstance(find, Cache) else {"model": find.identity()}


def rated(
    find: Finder, examples: Sequence[Example], pairs: Pairs, texts: Sequence[str], names: np.ndarray
) -> str | Rated:
    """Return a finder as `choose` takes it, its features computed.

    Args:
        find: as `check_finder` let it pass.
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
    return Rated(_images(find, examples, pairs).numpy(), text.numpy()[names])


def _of_split(
    rows: Rows, images: np.ndarray, captions: np.ndarray, wanted: Wanted, find: str | Rated
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Choose false pairs of a split: positions in `images` and `captions`, first for images."""
    owner = np.searchsorted(images, rows.owner[captions])
    names = np.unique(rows.names[captions], return_inverse=True)[1]
    split, places = str(rows.splits[images[0]]), np.arange(len(images))
    draws = [np.random.default_rng([wanted.seed, crc32(split.encode()), way]) for way in range(2)]
    sides = _Side(places, names, (owner, names)), _Side(names, places, (names, owner))
    counts = (wanted.false, wanted.false_images)
    if isinstance(find, Rated):
        image, text = _unit(find.image[images]), _unit(find.text[captions])
        pairs = [_top(sides[0], image, text, counts[0]), _top(sides[1], text, image, counts[1])]
    else:
        first: list[np.ndarray | None] = [None, None]
        if find == "batch":
            first[0] = _one_caption(owner, draws[0])[_batches(len(images), counts[0], draws[0])]
            first[1] = _batches(len(images), counts[1], draws[1])[owner]
        pairs = [_drawn(s, c, d, f) for s, c, d, f in zip(sides, counts, draws, first, strict=True)]
    return [pairs[0], pairs[1][::-1]]


class _Side:
    """One direction within a split: queries, partners, and which of these are not false.

    A query and a partner are true to each other when their classes are an owned pair.
    """

    def __init__(
        self, query: np.ndarray, partner: np.ndarray, owned: tuple[np.ndarray, np.ndarray]
    ) -> None:
        self.queries, self.partners = len(query), len(partner)
        self._query, self._partner = query, partner
        self._width = int(partner.max()) + 1
        self._owned = np.unique(owned[0].astype(np.int64) * self._width + owned[1])

    def true(self, queries: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Tell whether partners (q, w) of queries (q,) are true: bool (q, w)."""
        keys = self._query[queries, None] * self._width + self._partner[partners]
        place = np.searchsorted(self._owned, keys).clip(max=len(self._owned) - 1)
        return self._owned[place] == keys

    def true_of_all(self, queries: np.ndarray) -> np.ndarray:
        """Tell whether each partner is true: bool (q, partners)."""
        classes, place = np.unique(self._query[queries], return_inverse=True)
        table = np.zeros((len(classes), self._width), dtype=bool)
        start, stop = np.searchsorted(self._owned, np.stack([classes, classes + 1]) * self._width)
        counts = stop - start
        runs = np.repeat(start - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
        table[np.repeat(np.arange(len(classes)), counts), self._owned[runs] % self._width] = True
        return table[place][:, self._partner]


def _top(
    side: _Side, query: np.ndarray, partner: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the false partners with the highest product: (F,) queries and (F,) partners."""
    chosen = []
    for queries in _chunks(np.arange(side.queries), side.partners):
        keys = query[queries] @ partner.T
        keys[side.true_of_all(queries)] = -np.inf
        row, column = _best(keys, count)
        chosen.append((queries[row], column))
    return _joined(chosen)


def _drawn(
    side: _Side, count: int, draw: np.random.Generator, first: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw false partners; the columns `first` (queries, w) of each query go before others."""
    left = np.arange(side.queries)
    chosen = []
    if 4 * count <= side.partners:  # few of many: most queries need no look at all partners
        short = []
        for queries in _chunks(left, 3 * count):
            columns, keys = _sampled(side, queries, count, draw, first)
            enough = (keys > -np.inf).sum(axis=1) >= count
            row, place = _best(keys[enough], count)
            chosen.append((queries[enough][row], columns[enough][row, place]))
            short.append(queries[~enough])
        left = np.concatenate(short)
    for queries in _chunks(left, side.partners):
        keys = draw.random((len(queries), side.partners), dtype=np.float32)
        if first is not None:
            np.put_along_axis(keys, first[queries], _SURE, axis=1)
        keys[side.true_of_all(queries)] = -np.inf
        row, column = _best(keys, count)
        chosen.append((queries[row], column))
    return _joined(chosen)


def _sampled(
    side: _Side,
    queries: np.ndarray,
    count: int,
    draw: np.random.Generator,
    first: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw partners (q, w) of each query, with a preference (q, w): -inf for true or repeated."""
    columns = draw.integers(side.partners, size=(len(queries), 2 * count))
    keys = draw.random(columns.shape, dtype=np.float32)
    if first is not None:
        columns = np.concatenate([first[queries], columns], axis=1)
        keys = np.pad(keys, ((0, 0), (first.shape[1], 0)), constant_values=_SURE)
    order = columns.argsort(axis=1, kind="stable")  # of repeated ones the first is kept
    columns = np.take_along_axis(columns, order, axis=1)
    keys = np.take_along_axis(keys, order, axis=1)
    keys[:, 1:][columns[:, 1:] == columns[:, :-1]] = -np.inf
    keys[side.true(queries, columns)] = -np.inf
    return columns, keys


def _batches(images: int, others: int, draw: np.random.Generator) -> np.ndarray:
    """Cut images into seeded batches → the other images of each image's batch (images, others).

    The last batch is filled up from the first, so that none is short.
    """
    size = min(others + 1, images)
    order = draw.permutation(images)
    start = np.arange(images) // size * size
    members = order[(start[:, None] + np.arange(size)) % images]
    rest = members[members != order[:, None]].reshape(images, size - 1)
    return rest[order.argsort()]


def _one_caption(owner: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Draw one caption of each image → (images,); `owner` is ascending."""
    counts = np.bincount(owner)
    return np.cumsum(counts) - counts + (draw.random(len(counts)) * counts).astype(np.int64)


def _best(keys: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find rows and columns of the `count` highest finite keys of each row."""
    least = max(0, keys.shape[1] - count)
    if not count:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    top = np.argpartition(keys, least, axis=1)[:, least:]
    row, place = np.nonzero(np.take_along_axis(keys, top, axis=1) > -np.inf)
    return row, top[row, place]


def _chunks(rows: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Cut rows into runs whose tables of that width are not too large."""
    size = max(1, ENTRIES // max(1, width))
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    query, partner = (np.concatenate([part[side] for part in parts]) for side in range(2))
    return query, partner


def _unit(rows: np.ndarray) -> np.ndarray:
    """Bring rows to length 1; a cache keeps them in half precision."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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


def _cached(find: Cache, examples: Sequence[Example]) -> Rated:
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
    return Rated(
        find.image_features(np.array(images)).numpy(), find.text_features(np.array(texts)).numpy()
    )


def _of_other_data(find: Cache, example: Example) -> MismatchError:
    return MismatchError(
        f"find = {find.folder}: a cache of other data, {example.path} with its captions is not in "
        "it; make a cache of the same data"
    )
