"""Candidate lists of a score cache: the batches that train a student, and its validation.

Each of a batch's B pairs asks twice: its image ranks captions, its caption ranks images. Of the
candidates that the teacher scored, only the hardest few go on to the student.

In validation a fusion model ranks each query's own candidates. The whole split would be images x
captions passes after every epoch; the pairs that the cache lists are few, so that recall is that of
re-ranking: what is not listed counts as behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstill.cache import Split, pixels
from crosstill.evaluate.bootstrap import Answers
from crosstill.evaluate.embedding import Measured, cached_truth, settled_images, settled_texts
from crosstill.evaluate.recall import Ranking, Retrieval, chances_of_scores, from_scores
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.scores import ScoreCache
from crosstill.fusion.states import Sides
from crosstill.students.student import Student, Tokens
from crosstill.teachers.base import evaluating
from crosstill.train.batches import Picked, Sampler, ahead
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.types import States

FALSE = 63  # F, candidates of a list that a teacher beside the student scores, as DCD has it
BLOCK = 64  # images whose states are in memory at a time, in validation


@dataclass(frozen=True)
class Directions:
    """Directions in which lists are made, and their length."""

    names: tuple[str, ...]  # of "image" and "text"
    hardest: int  # negatives of each list that reach the student


@dataclass(frozen=True)
class CandidateLists:
    """Lists of a batch in one direction: rows of the batch's own images and texts."""

    partners: Tensor  # (B, N) int64; column 0 is the true one
    valid: Tensor  # (B, N) bool
    teacher: Tensor | None


@dataclass(frozen=True)
class ListBatch:
    """One step's input. Images and texts are distinct; lists and pairs name them by row."""

    images: Any  # for a dual encoder uint8 (I, 3, H, W) or pooled (I, W); for a fusion model
    texts: Any  # Tokens or pooled (T, W); for a fusion model what `Sides` gives
    pairs: tuple[Tensor, Tensor]  # (B,) rows of images and of texts
    lists: dict[str, CandidateLists]
    ids: Tensor  # (B,) int64 keys of the images
    picked: Picked


@dataclass(frozen=True)
class DrawnLists:
    """Lists of a batch in one direction, as positions in the split."""

    partners: np.ndarray  # (B, N)
    valid: np.ndarray  # (B, N) bool
    scores: np.ndarray | None  # (B, N) float32


class DualInputs:
    """A dual encoder's inputs by position in a split."""

    def __init__(
        self, cache: ScoreCache, split: Split, student: Student, config: TrainConfig
    ) -> None:
        self._student = student
        self._tokens = student.tokenize([cache.texts[row] for row in split.captions])
        self._pooled_images = settled_images(student, cache, split, config.freeze)
        self._pooled_texts = settled_texts(student, cache, split, config.freeze)
        if self._pooled_images is None:
            self._photos = pixels(cache, split, student.preprocess)

    def images(self, positions: np.ndarray) -> Tensor:
        """Return photos, uint8 (I, 3, H, W), or pooled rows (I, W) of a frozen tower."""
        if self._pooled_images is not None:
            return self._pooled_images[torch.from_numpy(positions)]
        return self._photos.take(positions)

    def texts(self, positions: np.ndarray) -> Tokens | Tensor:
        """Return tokens, or pooled rows (T, W) of a frozen tower."""
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
        ways: Directions,
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
            shuffle=config.shuffle,
        )
        self._ways, self._config = ways, config

    def batch(self, epoch: int, step: int) -> ListBatch:
        """Make the batch of one step."""
        picked, device = self.sampler.pick(epoch, step), self.group.device
        random = np.random.default_rng([self._config.seed, epoch, step])
        draw = self._draw_anew if self._config.teacher else self._draw
        draw = self._take_batch if self._config.negatives == "batch" else draw
        drawn = {way: draw(way, picked, random) for way in self._ways.names}
        images, image_rows = _distinct(picked.images, drawn.get("text"))
        texts, text_rows = _distinct(picked.captions, drawn.get("image"))
        partners = {"image": text_rows, "text": image_rows}
        lists = {
            way: CandidateLists(
                torch.from_numpy(partners[way][1]),
                torch.from_numpy(chosen.valid),
                None if chosen.scores is None else torch.from_numpy(chosen.scores),
            )
            for way, chosen in drawn.items()
        }
        batch = ListBatch(
            self.inputs.images(images),
            self.inputs.texts(texts),
            (torch.from_numpy(image_rows[0]), torch.from_numpy(text_rows[0])),
            lists,
            self.cache.keys[torch.from_numpy(self.split.images[picked.images])],
            picked,
        )
        return batch if device.type == "cpu" else _moved(batch, device)

    def ahead(self, epoch: int, first: int) -> Iterator[tuple[int, ListBatch, float]]:
        """Yield (step, batch, seconds waited for it) from step `first` to the end of the epoch."""
        yield from ahead(self.batch, epoch, range(first, self.sampler.steps_per_epoch))

    def _draw(self, way: str, picked: Picked, random: np.random.Generator) -> DrawnLists:
        """Choose the lists of one direction among the scored candidates."""
        sides = (picked.images, self.split.images), (picked.captions, self.split.captions)
        (queries, rows), (true, partner_rows) = sides if way == "image" else sides[::-1]
        of = self.cache.of_image if way == "image" else self.cache.of_caption
        size = 1 + self._ways.hardest
        partners = np.repeat(true[:, None], size, axis=1)
        valid = np.zeros(partners.shape, dtype=bool)
        valid[:, 0] = True
        known = self.cache.true_scores
        scores = None if known is None else np.zeros(partners.shape, dtype=np.float32)
        if scores is not None and known is not None:
            scores[:, 0] = known[self.split.captions[picked.captions]]
        for row, query in enumerate(queries):
            false, false_scores = of(int(rows[query]))
            kept = self._choose(false_scores, len(false), size - 1, random)
            stop = 1 + len(kept)
            partners[row, 1:stop] = np.searchsorted(partner_rows, false[kept])
            valid[row, 1:stop] = True
            if scores is not None and false_scores is not None:
                scores[row, 1:stop] = false_scores[kept]
        return DrawnLists(partners, valid, scores)

    def _draw_anew(self, way: str, picked: Picked, random: np.random.Generator) -> DrawnLists:
        """Draw F random partners, which a teacher that runs beside the student will score."""
        true = picked.captions if way == "image" else picked.images
        count = len(self.split.captions if way == "image" else self.split.images)
        anew = random.integers(count, size=(len(true), self._config.drawn or FALSE))
        shown = self.split.owner[anew] if way == "image" else anew
        valid = np.c_[np.full(len(true), True), shown != picked.images[:, None]]
        return DrawnLists(np.c_[true, anew], valid, None)

    def _take_batch(self, way: str, picked: Picked, random: np.random.Generator) -> DrawnLists:
        """Take other pairs' partners: with all of them, B x B pairs serve both directions."""
        true = picked.captions if way == "image" else picked.images
        rows = np.arange(len(true))[:, None]
        steps = np.r_[0, 1 + random.permutation(len(true) - 1)[: self._ways.hardest]]
        others = (rows + steps) % len(true)
        valid = picked.images[others] != picked.images[:, None]
        valid[:, 0] = True
        return DrawnLists(true[others], valid, None)

    def _choose(
        self, scores: np.ndarray | None, count: int, wanted: int, random: np.random.Generator
    ) -> np.ndarray:
        """Choose the false candidates of a query that go on, the hardest first where scored."""
        kept = random.permutation(count)[: self._config.drawn]
        if scores is None:
            return kept[:wanted]
        if self._config.negatives == "random":
            kept = kept[:wanted]
        return kept[np.argsort(-scores[kept], kind="stable")][:wanted]


def _distinct(
    own: np.ndarray, drawn: DrawnLists | None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Find the distinct positions, and where the (B,) own and (B, N) listed ones are in them."""
    listed = own[:, None] if drawn is None else drawn.partners
    whole, inverse = np.unique(np.concatenate([own, listed.ravel()]), return_inverse=True)
    return whole, (inverse[: len(own)], inverse[len(own) :].reshape(listed.shape))


def _moved(value: Any, device: torch.device) -> Any:
    """Move a batch to another device, through its tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(part, device) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, ListBatch | CandidateLists):
        return replace(
            value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)}
        )
    return value


class ListedPairs:
    """The P pairs of one split that a score cache lists, by position in the split.

    Attributes:
        image: (P,) of each pair's image, ascending.
        text: (P,) of its caption.
        owner: (T,) int64, the image of each caption.
        truth: which images and captions belong together.
    """

    def __init__(self, cache: ScoreCache, split: Split) -> None:
        inside = np.isin(cache.pair_images, split.images)
        self.image = np.searchsorted(split.images, cache.pair_images[inside])
        self.text = np.searchsorted(split.captions, cache.pair_captions[inside])
        self.truth = cached_truth(cache, split)
        self.owner = self.truth.owner
        self._scores = None if cache.scores is None else cache.scores[torch.from_numpy(inside)]

    def matrix(self, scores: Tensor) -> Tensor:
        """Lay out scores (P,) as (I, T), with -inf for pairs that are not listed."""
        whole = torch.full((int(self.owner.max()) + 1, len(self.owner)), -torch.inf)
        whole[torch.from_numpy(self.image), torch.from_numpy(self.text)] = scores
        return whole

    def teacher_recall(self) -> Retrieval | None:
        """Compute the recall of the teacher's scores, where the cache has them."""
        return None if self._scores is None else from_scores(self.matrix(self._scores), self.truth)


class MatchedSplit:
    """A fusion model on the listed pairs of one split: see `crosstill.train.task.Validation`."""

    def __init__(self, cache: ScoreCache, split: Split, sides: Sides) -> None:
        self._sides, self._listed = sides, ListedPairs(cache, split)
        self.caveat = cache.caveat(split)

    def recall(self, model: Matcher) -> Ranking:
        """Compute the model's recall among the listed candidates."""
        return from_scores(self._matrix(model), self._listed.truth)

    def measure(self, model: Matcher) -> Measured:
        """Compute the same; a fusion model has no rows that could be alike."""
        return Measured(self.recall(model), {})

    def answers(self, model: Matcher) -> Answers:
        """Compute the chance of each query to be answered among its listed candidates."""
        truth = self._listed.truth
        return Answers(*chances_of_scores(self._matrix(model), truth), truth.owner)

    def teacher_recall(self) -> Retrieval | None:
        """Compute the recall of the teacher's scores, where the cache has them."""
        return self._listed.teacher_recall()

    def teacher_cosines(self) -> dict[str, float]:
        """Return none: a fusion teacher has no rows."""
        return {}

    def _matrix(self, model: Matcher) -> Tensor:
        with evaluating(model):
            last = int(self._listed.image.max()) + 1
            parts = [self._block(model, start) for start in range(0, last, BLOCK)]
        return self._listed.matrix(torch.cat(parts))

    def _block(self, model: Matcher, start: int) -> Tensor:
        listed = self._listed
        inside = (listed.image >= start) & (listed.image < start + BLOCK)
        images, image = np.unique(listed.image[inside], return_inverse=True)
        texts, text = np.unique(listed.text[inside], return_inverse=True)
        sides = run_towers(model, self._sides, images, texts)
        entered = model.project(sides[0], "image"), model.project(sides[1], "text")
        pairs = torch.from_numpy(np.stack([image, text], axis=1))
        return model.score_pairs(*entered, pairs)


def run_towers(
    model: Matcher, sides: Sides, images: np.ndarray, texts: np.ndarray
) -> tuple[States, States]:
    """Return the towers' states of images and texts at these positions, kept or computed now."""
    inputs, tokens = sides.images(images), sides.texts(texts)
    tokens = States(*(part.to(model.device) for part in tokens))
    if isinstance(inputs, States):
        return States(*(part.to(model.device) for part in inputs)), tokens
    return model.encode_mixed(list(inputs)), model.encode_texts(tokens)
