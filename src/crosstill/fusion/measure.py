"""Scores and seconds of fusion models on a whole split: every pair, or those that are asked for."""

import logging
from collections.abc import Callable, Generator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from crosstill import progress
from crosstill.data import Pairs
from crosstill.evaluate.compare import Options, Work
from crosstill.evaluate.embedding import BATCH, Stopwatch, captions, readable, sound
from crosstill.evaluate.evaluation import Cost, Evaluation, Row, Timed, one_thread
from crosstill.evaluate.extended import Placed
from crosstill.evaluate.recall import from_scores, protocol_truth
from crosstill.evaluate.truth import Truth, of_texts
from crosstill.formats import by_length
from crosstill.fusion.matcher import GPU_PAIRS, PAIRS, Matcher, Reader, joined
from crosstill.images import Quarantine

_log = logging.getLogger(__name__)

KEPT = 2**31  # bytes of texts' states that are kept for the next images, not read again
PASSES = 16  # between two moves of the bar
IMAGES, TEXTS = 64, 256  # of a timed sample; more of either where its pairs need them
LOOKED, READ = 16, 64  # images and captions in a timed pass of a sample
ROUNDS = 8  # timed pieces of a sample's pairs

Piece = TypeVar("Piece", bound=Sized)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Scored:
    """The scores of a split by a fusion model.

    Attributes:
        scores: (I, T) float32 logits, -inf where none was asked for.
        truth: which images and captions belong together.
        image_ids: of the I images.
        quarantine: the images that were left out.
        passes: pairs scored.
        towers: seconds spent on either side alone.
        matching: seconds spent on pairs.
    """

    scores: Tensor
    truth: Truth
    image_ids: list[str]
    quarantine: Quarantine
    passes: int
    towers: float
    matching: float


def score_matrix(model: Matcher, pairs: Pairs, strict: bool = False) -> Scored:
    """Score every image of a dataset with every caption.

    Raises:
        DataError: no image is readable.
        ImageError: an image is unreadable and `strict` is set.
        ModelError: a score is NaN or infinite.
    """
    return score(model, readable(pairs, [model.preprocess], strict))


def score(model: Matcher, pairs: Pairs, wanted: Tensor | None = None) -> Scored:
    """Score pairs of a dataset whose images were found `readable`; each image is seen once.

    Args:
        model: what scores.
        pairs: I images and their T captions.
        wanted: (I, T) bool, which pairs; None means all.

    Raises:
        ImageError: an image has become unreadable.
        ModelError: a score is NaN or infinite.
    """
    texts, owner = captions(pairs.examples)
    scores = torch.full((len(pairs), len(texts)), -torch.inf)
    wanted = torch.ones(scores.shape, dtype=torch.bool) if wanted is None else wanted
    passes = int(wanted.sum())
    towers, matching = Stopwatch(), Stopwatch()
    reader, chunks = Reader(model, texts, KEPT, BATCH), by_length(map(len, texts), BATCH)
    step = PASSES * (PAIRS if model.device.type == "cpu" else GPU_PAIRS)
    first = 0
    with progress.bar("pairs", passes) as bar:
        for pixels in sound(pairs, model.preprocess):
            rows = slice(first, first + len(pixels))
            first = rows.stop
            with towers.running():
                seen = model.image_states(pixels)
            for chunk in chunks:
                columns = torch.tensor(chunk)
                with towers.running():
                    read = reader.states(chunk)
                # text by text, so that pairs of one length follow each other
                chosen = wanted[rows, columns].T.nonzero().flip(1)
                for some in chosen.split(step):
                    with matching.running():
                        logits = model.score_pairs(seen, read, some)
                    scores[rows.start + some[:, 0], columns[some[:, 1]]] = logits
                    bar.advance(len(some))
    return Scored(
        scores=scores,
        truth=of_texts(owner, texts),
        image_ids=[example.image_id for example in pairs.examples],
        quarantine=pairs.quarantine,
        passes=passes,
        towers=towers.seconds,
        matching=matching.seconds,
    )


class PairMeasure:
    """Measures fusion models: recall is of every pair's score, seconds of a sample or of all."""

    pairwise: ClassVar[bool] = True

    def row(
        self, model: Matcher, name: str, pairs: Pairs, options: Options, placed: Sequence[Placed]
    ) -> Row:
        """As `Measure.row`; a model that is only timed on a sample has no recall."""
        if options.sample is not None:
            return Timed(name, model.parameter_count())
        images, texts = len(pairs), len(captions(pairs.examples)[0])
        _log.info(
            "%s: %d images x %d captions are %s passes", name, images, texts, f"{images * texts:,}"
        )
        with one_thread() if options.efficiency else nullcontext():
            scored = score(model, pairs)
        seconds = scored.towers + scored.matching
        return Evaluation(
            name,
            from_scores(scored.scores, protocol_truth(options.protocol, scored.truth)),
            model.parameter_count(),
            cost=Cost(scored.passes, seconds) if options.efficiency else None,
            extended=tuple(truth.of_scores(scored.scores) for truth in placed),
        )

    def time(self, model: Matcher, pairs: Pairs, sample: int) -> Work:
        """As `Measure.time`: medians of random images and captions, extrapolated to all pairs."""
        texts, _ = captions(pairs.examples)
        images, total = len(pairs), len(texts)
        sample = min(sample, images * total)
        few = min(images, max(IMAGES, -(-sample // total)))
        some = min(total, max(TEXTS, -(-sample // few)))
        draw = torch.Generator().manual_seed(0)
        chosen = torch.randperm(images, generator=draw)[:few].tolist()
        words = [texts[row] for row in torch.randperm(total, generator=draw)[:some].tolist()]
        shown = replace(pairs, examples=tuple(pairs.examples[row] for row in chosen))
        pixels = [photo for chunk in sound(shown, model.preprocess) for photo in chunk]
        looks = [pixels[start : start + LOOKED] for start in range(0, few, LOOKED)]
        look, seen = yield from _timed(looks, model.image_states)
        reads = [[words[row] for row in rows] for rows in by_length(map(len, words), READ)]
        read, known = yield from _timed(reads, model.text_states)
        sides = joined(seen), joined(known)
        match, _ = yield from _timed(
            _rounds(few, some, sample), lambda rows: model.score_pairs(*sides, rows)
        )
        passes = images * total
        return Cost(passes, images * look + total * read + passes * match, sample)


def _rounds(images: int, texts: int, sample: int) -> list[Tensor]:
    """Choose pairs (P, 2), in pieces that each have short texts and long ones.

    The texts are sorted by length; a text meets all images, as where every pair is scored.
    """
    spread = torch.linspace(0, texts - 1, -(-sample // images)).round().long()
    order = torch.cat([spread[start::ROUNDS] for start in range(ROUNDS)])
    every = torch.cartesian_prod(order, torch.arange(images))[:sample].flip(1)
    return [piece for piece in every.tensor_split(ROUNDS) if len(piece)]


def _timed(
    pieces: Sequence[Piece], job: Callable[[Piece], Result]
) -> Generator[None, None, tuple[float, list[Result]]]:
    """Time a job: median seconds of an item, and all results; the first piece warms it up."""
    job(pieces[0])
    seconds, results = [], []
    for piece in pieces:
        watch = Stopwatch()
        with watch.running():
            results.append(job(piece))
        seconds.append(watch.seconds / len(piece))
        yield
    return median(seconds), results
