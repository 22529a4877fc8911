"""The format of a score cache: a fusion teacher's scores of chosen pairs of images and captions.

A score cache is a folder:

    scores.json        sealed header: teacher, data, candidates, SHA-256 of every other file
    images.parquet     one row an image: image_id, path, split
    captions.parquet   one row a caption: image (row of images.parquet), text
    indptr.npy         int64 (I + 1,): the pairs of image i are indptr[i] to indptr[i + 1]
    captions.npy       int32 (P,): caption row of each pair, ascending within an image
    score-00000.npy …  float32: the scores of the pairs of consecutive images, higher is better
    quarantine.jsonl   images that could not be read, with the reason
    pixels/            decoded photos and outputs of frozen towers, made on demand (see `memo`)

Rows are in the order of the image ids. Every caption is paired with its own image, and with as
many others as were asked for. Without a teacher the pairs are there and no scores. `build_scores`
writes the scores shard by shard, so that a kill costs one shard at most.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crosstill import artefacts, decoding, images, progress
from crosstill.cache import Split, cache_builder, format
from crosstill.data import Pairs
from crosstill.errors import ConfigError, CorruptError, DataError, ModelError
from crosstill.evaluate.recall import DEPTHS
from crosstill.fusion import candidates
from crosstill.fusion.matcher import FusionTeacher, Matcher, Reader, score_pairs
from crosstill.types import Example

FORMAT = 1
HEADER = "scores.json"
INDPTR = "indptr.npy"
PAIRS = "captions.npy"
SHARD_IMAGES = 64  # images whose pairs share a shard: what a kill can cost at most
CALL = 4096  # pairs handed to the teacher at a time: their texts' states are held at once

Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]

log = logging.getLogger(__name__)


class Partners(NamedTuple):
    """The false partners of all queries: those of query q are indptr[q] to indptr[q + 1]."""

    indptr: np.ndarray  # (Q + 1,)
    rows: np.ndarray  # (F,) row of each partner, ascending within a query
    pairs: np.ndarray  # (F,) which of all pairs it is

    def counts(self, queries: np.ndarray) -> np.ndarray:
        """Count the false partners of some queries."""
        return self.indptr[queries + 1] - self.indptr[queries]


class ScoreCache(format.CacheBase):
    """An opened score cache.

    Attributes:
        indptr: (I + 1,) int64, see the format above.
        pair_images: (P,) int32 image row of each pair, ascending.
        pair_captions: (P,) int32 caption row of each pair.
        scores: (P,) float32; None when no teacher scored them.
        true_scores: (T,) float32 score of each caption with its own image, or None.
        by_image: false captions of each image.
        by_caption: false images of each caption.
    """

    file = HEADER
    version = FORMAT
    model = format.Header
    task = "crosstill.fusion.list_task:ListTask"
    noun = "a score cache"
    contents = "scores of pairs"
    remedy = "a score cache with `crosstill cache` and a fusion model"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.indptr = self._load(INDPTR, "i")
        self.pair_captions = self._load(PAIRS, "i")
        self._check_pairs()
        rows = np.arange(len(self.image_ids), dtype=np.int32)
        self.pair_images = np.repeat(rows, np.diff(self.indptr))
        self.scores: Tensor | None = self._read_scores()
        true = self.owner[self.pair_captions] == self.pair_images
        self.true_scores = None if self.scores is None else self.scores.numpy()[true]
        false = np.flatnonzero(~true)
        self.by_image = _grouped(self.pair_images, self.pair_captions, false, len(self.image_ids))
        self.by_caption = _grouped(self.pair_captions, self.pair_images, false, len(self.texts))

    def of_image(self, image: int) -> tuple[np.ndarray, np.ndarray | None]:
        """List the false captions of an image row, ascending, and their scores, if any."""
        return self._of(self.by_image, image)

    def of_caption(self, caption: int) -> tuple[np.ndarray, np.ndarray | None]:
        """List the false images of a caption row, ascending, and their scores, if any."""
        return self._of(self.by_caption, caption)

    def summary(self) -> str:
        """As `CacheBase.summary`: the number of pairs, and how many of each were wanted."""
        pairs, key = f"{len(self.pair_captions):,} pairs", self.header["key"]
        scored = pairs if self.scores is not None else f"{pairs} without scores"
        counts = f"F = {key['false']} false captions an image, {key['false_images']} images a"
        return f"{scored} ({counts} caption)"

    @property
    def listed(self) -> int:
        return len(self.pair_captions)

    @property
    def scored(self) -> bool:
        return self.scores is not None

    def caveat(self, split: Split) -> str:
        images = self.by_image.counts(split.images)
        captions = self.by_caption.counts(split.captions)
        text = (
            "Each query ranks only its true partners and the false ones that the score cache lists "
            f"for it, on average {images.mean():.1f} captions of an image and "
            f"{captions.mean():.1f} images of a caption, not the whole split."
        )
        sure = [float((count < DEPTHS[-1]).mean()) for count in (images, captions)]
        parts = [f"{s:.0%} of {w}" for s, w in zip(sure, ("images", "captions"), strict=True) if s]
        if parts:
            text += (
                f" R@{DEPTHS[-1]} is 100 for any model on the {' and '.join(parts)} that have "
                f"fewer than {DEPTHS[-1]} false ones."
            )
        return text

    def least_false(self, split: str) -> tuple[int, int]:
        """Count the fewest false captions of an image of a split, and false images of a caption."""
        rows = self.split(split)
        captions = self.by_image.counts(rows.images).min()
        return int(captions), int(self.by_caption.counts(rows.captions).min())

    def _of(self, partners: Partners, query: int) -> tuple[np.ndarray, np.ndarray | None]:
        places = slice(partners.indptr[query], partners.indptr[query + 1])
        scores = None if self.scores is None else self.scores.numpy()[partners.pairs[places]]
        return partners.rows[places], scores

    def _read_scores(self) -> Tensor | None:
        names = sorted(name for name in self.header["files"] if name.startswith("score-"))
        if not names:
            return None
        scores = np.concatenate([self._load(name, "f") for name in names])
        if len(scores) != len(self.pair_captions):
            raise CorruptError(f"{self.folder / self.file}: its scores do not add up")
        return torch.from_numpy(scores)

    def _check_pairs(self) -> None:
        """Refuse pairs of images or captions that there are not."""
        pairs, steps = self.pair_captions, np.diff(self.indptr)
        ends = len(self.indptr) == len(self.image_ids) + 1 and (self.indptr[0], self.indptr[-1])
        inside = not len(pairs) or 0 <= pairs.min() <= pairs.max() < len(self.texts)
        if ends != (0, len(pairs)) or (steps < 0).any() or not inside:
            raise CorruptError(f"{self.folder / self.file}: its pairs do not add up")

    def _load(self, name: str, kinds: str) -> np.ndarray:
        return artefacts.array(self.folder / name, kinds, 1)


def _grouped(queries: np.ndarray, partners: np.ndarray, false: np.ndarray, count: int) -> Partners:
    """Group false pairs by query; a stable sort keeps the partners of each ascending."""
    pairs = false[queries[false].argsort(kind="stable")]
    counts = np.bincount(queries[false], minlength=count)
    return Partners(np.concatenate([[0], counts.cumsum()]), partners[pairs], pairs)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The choice of the pairs that are scored besides the true ones."""

    false: int = 63  # false captions of each image
    false_images: int = 7  # false images of each caption
    find: candidates.Finder = "random"  # or "batch", or whose highest cosines are taken
    seed: int = 0  # of what is drawn
    strict: bool = False  # stop at the first unreadable image
    teacher_licence: str | None = None  # where the teacher's card does not say

    def __post_init__(self) -> None:
        if min(self.false, self.false_images) < 0 or not self.false + self.false_images:
            raise ConfigError(
                f"false = {self.false}, false_images = {self.false_images}: give numbers of "
                "candidates, at least one of them above 0"
            )
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: give 0 or more")


def build_scores(  # noqa: PLR0913  (every option of a cache is an argument)
    teacher: FusionTeacher | None,
    pairs: Pairs,
    folder: str | Path,
    *,
    false: int = 63,
    false_images: int = 7,
    find: str | Path | candidates.Finder = "random",
    seed: int = 0,
    strict: bool = False,
    teacher_licence: str | None = None,
) -> ScoreCache:
    """Make the score cache of `pairs` under `teacher`, or finish it, or find it already there.

    Args:
        teacher: a fusion model; None keeps the candidates without scores, which is what a
            fusion model itself is trained from.
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        false: false captions of each image.
        false_images: false images of each caption.
        find: "random", "batch", or the model or cache whose highest cosines are taken, or its
            folder.
        seed: of what is drawn.
        strict: stop at the first unreadable image.
        teacher_licence: where the teacher's card does not say.

    Raises:
        MismatchError: the folder holds a cache of another teacher, dataset or setting, or the
            finder is a cache of another dataset.
        LockedError: another process is building in the folder.
        ConfigError: an option that cannot be, or a folder that holds something else.
        ModelError: the teacher gives no scores, or scores that are not finite.
        ImageError: an image is unreadable and `strict` is set.
        DataError: no image is readable, or one of the train split has no false candidate.
    """
    options = ScoreOptions(
        false=false,
        false_images=false_images,
        find=candidates.open_finder(find),
        seed=seed,
        strict=strict,
        teacher_licence=teacher_licence,
    )
    if teacher is not None and not isinstance(teacher, FusionTeacher):
        name = getattr(teacher, "name", type(teacher).__name__)
        raise ModelError(f"{name}: embeds each side alone and scores no pairs; make a plain cache")
    pairs = pairs.captioned()
    candidates.check_finder(options.find, pairs)
    return _ScoreBuilder(teacher, pairs, folder, options).make()


class _ScoreBuilder(cache_builder.CacheBuilder[ScoreCache]):
    """Build a score cache."""

    opens = ScoreCache
    kinds = ("image", "pairs", "score")
    key_names: ClassVar = {
        "data": "dataset",
        "false": "number of false captions",
        "false_images": "number of false images",
        "find": "candidate finder",
    }

    def __init__(
        self,
        teacher: FusionTeacher | None,
        pairs: Pairs,
        folder: str | Path,
        options: ScoreOptions,
    ) -> None:
        self.teacher, self.options = teacher, options
        description = _describe(teacher)
        key = {
            "teacher": description["identity"],
            "data": pairs.digest(),
            "false": options.false,
            "false_images": options.false_images,
            "find": candidates.finder_identity(options.find),
            "seed": options.seed,
        }
        reading = cache_builder.ReadOptions(
            seed=options.seed, strict=options.strict, teacher_licence=options.teacher_licence
        )
        super().__init__(pairs, folder, description, key, reading)

    def _source(self) -> cache_builder.ImageSource:
        return cache_builder.ImageSource(None if self.teacher is None else self.teacher.preprocess)

    def _fill(self, readable: list[Example]) -> dict[str, Any]:
        texts, names = candidates.numbered([t for e in readable for t in e.captions])
        indptr, captions = self._pairs(readable, texts, names)
        if isinstance(self.teacher, Matcher):
            every = [text for example in readable for text in example.captions]
            cache_builder.tell_truncated(self.teacher, self.teacher.name, every)
        if self.teacher is not None:
            self._score_shards(readable, texts, indptr, names[captions])
        made = [*self.journal.stored("pairs"), *self.journal.stored("score")]
        return {
            "rows": {"image": len(readable), "text": len(names), "pair": len(captions)},
            "files": {shard["file"]: shard["sha256"] for shard in made},
        }

    # --- candidates ---

    def _pairs(
        self, readable: list[Example], texts: list[str], names: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose pairs, or read those that an earlier process chose: as `candidates.choose`."""
        shards = self.journal.stored("pairs")
        if len(shards) == 2:
            indptr, captions = (
                np.load(self.folder / shard["file"], allow_pickle=False) for shard in shards
            )
            return indptr, captions
        self.journal.shards["pairs"].clear()
        self.journal.shards["score"].clear()
        owner = np.repeat(np.arange(len(readable)), [len(e.captions) for e in readable])
        splits = np.array([example.split for example in readable], dtype=object)
        rows = candidates.Rows(owner, names, splits)
        wanted = candidates.Wanted(self.options.false, self.options.false_images, self.options.seed)
        find = candidates.rated(self.options.find, readable, self.pairs, texts, names)
        indptr, captions = candidates.choose(rows, wanted, find)
        self._refuse_queries_without_candidates(rows, indptr, captions)
        self._warn_of_few(rows, indptr, captions)
        self.journal.commit("pairs", indptr, name=INDPTR)
        self.journal.commit("pairs", captions, name=PAIRS)
        return indptr, captions

    def _warn_of_few(self, rows: candidates.Rows, indptr: np.ndarray, captions: np.ndarray) -> None:
        """Warn of splits that have fewer candidates than are wanted."""
        images = np.diff(indptr) - np.bincount(rows.owner, minlength=len(rows.splits))
        texts = np.bincount(captions, minlength=len(rows.owner)) - 1
        sides = (
            ("captions of an image", self.options.false, images, rows.splits),
            ("images of a caption", self.options.false_images, texts, rows.splits[rows.owner]),
        )
        for side, count, counts, splits in sides:
            for split in sorted(set(splits)):
                least = int(counts[splits == split].min())
                if least < count:
                    log.warning("split %s: only %d of %d false %s", split, least, count, side)

    def _refuse_queries_without_candidates(
        self, rows: candidates.Rows, indptr: np.ndarray, captions: np.ndarray
    ) -> None:
        """Refuse a query of the train split without a false candidate: it could teach nothing."""
        trains = rows.splits == "train"
        images = np.diff(indptr) - np.bincount(rows.owner, minlength=len(trains))
        texts = np.bincount(captions, minlength=len(rows.owner)) - 1
        alone = int((images[trains] == 0).sum()) if self.options.false else 0
        unseen = int((texts[trains[rows.owner]] == 0).sum()) if self.options.false_images else 0
        if alone or unseen:
            kind = f"{alone} images have no false caption"
            raise DataError(
                f"{self.pairs.name}: in split 'train' "
                f"{kind if alone else f'{unseen} captions have no false image'}: all that is "
                "there is true of them; add images with other captions"
            )

    # --- scores ---

    def _score_shards(
        self, readable: list[Example], texts: list[str], indptr: np.ndarray, names: np.ndarray
    ) -> None:
        """Score the pairs that are left; `names` (P,) is the row of `texts` of each pair."""
        first = len(self.journal.shards["score"])
        bounds = indptr[np.r_[: len(readable) : SHARD_IMAGES, len(readable)]]
        image = np.repeat(np.arange(len(readable)) % SHARD_IMAGES, np.diff(indptr))
        left = readable[first * SHARD_IMAGES :]
        reader = Reader(self.teacher, texts) if isinstance(self.teacher, Matcher) else None
        if reader is not None and left:
            for part in _calls(bounds[: first + 1]):  # an earlier process scored these
                reader.keep(np.unique(names[part]).tolist())
        with progress.bar("pairs", len(names), int(bounds[first])) as bar:
            for batch in decoding.batches(self._photo, left, SHARD_IMAGES):
                shard = len(self.journal.shards["score"])
                parts = []
                score = self._scorer([photo for _, photo in batch], texts, reader)
                for part in _calls(bounds[shard : shard + 2]):
                    parts.append(score(image[part], names[part]))
                    bar.advance(len(parts[-1]))
                self.journal.commit("score", np.concatenate(parts))

    def _photo(self, example: Example) -> Tensor:
        assert self.teacher is not None
        return images.load(self.pairs.read(example), example.path, self.teacher.preprocess)

    def _scorer(
        self, photos: Sequence[Tensor], texts: Sequence[str], reader: Reader | None
    ) -> Scorer:
        """Make a function that scores pairs, (P,) rows of photos and of texts → float32 (P,)."""
        teacher = self.teacher
        assert teacher is not None
        image_states = None if reader is None else reader.model.image_states(photos)

        def score(image: np.ndarray, name: np.ndarray) -> np.ndarray:
            rows, place = np.unique(name, return_inverse=True)
            pairs = torch.from_numpy(np.stack([image, place], axis=1))
            if reader is not None and image_states is not None:
                scores = reader.model.score_pairs(image_states, reader.states(rows.tolist()), pairs)
            else:
                scores = score_pairs(teacher, photos, [texts[row] for row in rows], pairs)
            if not scores.isfinite().all():
                raise ModelError(f"{teacher.name}: its scores are not finite; check its weights")
            return scores.float().cpu().numpy()

        return score


def _calls(bounds: np.ndarray) -> Iterator[slice]:
    """Yield the pairs of each call of the teacher, for shards between these bounds (S + 1,)."""
    for first, last in pairwise(bounds.tolist()):
        for start in range(first, last, CALL):
            yield slice(start, min(start + CALL, last))


def _describe(teacher: FusionTeacher | None) -> dict[str, Any]:
    if teacher is None:
        return dict.fromkeys(("name", "source", "licence", "parameters", "kind")) | {"identity": {}}
    known: Any = teacher
    return {
        "name": known.name,
        "source": known.source,
        "parameters": known.parameter_count(),
        "licence": known.licence,
        "identity": known.identity(),
        "kind": "fusion",
    }
