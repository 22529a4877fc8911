"""Scores and seconds of fusion models on a split: every pair, or those that a dual encoder finds.

In two-stage retrieval a dual encoder finds the top k, and a fusion model puts them in order. Both
directions have candidates of their own: the k captions nearest to each image, the k images nearest
to each caption. All other candidates stay behind these, in the finder's order.
"""

import logging
from collections.abc import Callable, Generator, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from crosstill import progress
from crosstill.data import Pairs
from crosstill.errors import ConfigError
from crosstill.evaluate.compare import Options, Work
from crosstill.evaluate.embedding import BATCH, Stopwatch, captions, embed, readable, sound
from crosstill.evaluate.evaluation import (
    HEADINGS,
    Cost,
    Evaluation,
    Row,
    Timed,
    figure,
    one_thread,
    remarks,
)
from crosstill.evaluate.extended import Placed
from crosstill.evaluate.recall import Ranking, Retrieval, from_scores, protocol_truth
from crosstill.evaluate.truth import Truth, of_texts
from crosstill.formats import aligned, by_length
from crosstill.fusion.matcher import GPU_PAIRS, PAIRS, Matcher, Reader, joined
from crosstill.images import Quarantine
from crosstill.models import open as open_model
from crosstill.teachers.base import Teacher, TextReader, truncation_note

log = logging.getLogger(__name__)

KEPT = 2**31  # bytes of texts' states that are kept for the next images, not read again
PASSES = 16  # between two moves of the bar
IMAGES, TEXTS = 64, 256  # of a timed sample; more of either where its pairs need them
LOOKED, READ = 16, 64  # images and captions in a timed pass of a sample
ROUNDS = 8  # timed pieces of a sample's pairs
DEPTHS = (1, 5, 10, 20, 50)
FURTHER = (100, 200, 500, 1000)
TOP = 20
BLOCK = 2**24  # scores that are sorted together

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
        log.info(
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


@dataclass(frozen=True)
class Stage:
    """Recall where the first `k` of the finder are re-ranked.

    Attributes:
        k: candidates of each query.
        recall: in percent.
        pairs: how many the judge has to score, each once for both directions.
        seconds: of the finder and the judge, decoding left out; below the greatest k the
            judge's time for pairs is that of the greatest, in proportion.
    """

    k: int
    recall: Retrieval
    pairs: int
    seconds: float
    estimated: bool


@dataclass(frozen=True)
class Reranked:
    """Recall as a function of k.

    Attributes:
        finder: the dual encoder's own row: k = 0.
        judge: the fusion model's name.
        stages: one a k, by increasing k.
        seconds: of the finder alone.
        threads: that torch computed with.
        quarantine: images that one of the two could not read.
        blend: see `rerank`.
        truncated: how many captions the two models cut, in words; "" for none.
    """

    finder: Evaluation
    judge: str
    stages: tuple[Stage, ...]
    seconds: float
    threads: int
    quarantine: Quarantine
    blend: float | None = None
    truncated: str = ""

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the numbers needs."""
        notes = remarks(self.quarantine, self.finder.recall.images, self.finder.recall.shared)
        notes += [self.truncated] if self.truncated else []
        if self.blend is not None:
            notes.append(f"re-ranked by the fusion model's logit + cosine / {self.blend:g}")
        if any(stage.estimated for stage in self.stages):
            last = self.stages[-1]
            notes.append(
                f"≈: the seconds of k = {last.k}, in proportion to the pairs ({last.pairs:,})"
            )
        return notes

    def table(self) -> str:
        """Write a Markdown table; passes are the finder's I + T and the judge's pairs."""
        heads = ["k", *HEADINGS[2:], "passes", "seconds"]
        own = self.finder.recall
        encoded = own.images + own.captions
        rows = [["0", *_recalls(own), f"{encoded:,}", figure(self.seconds)]]
        for stage in self.stages:
            mark = "≈" * stage.estimated
            passes, seconds = f"{encoded + stage.pairs:,}", mark + figure(stage.seconds)
            rows.append([str(stage.k), *_recalls(stage.recall), passes, seconds])
        return aligned(heads, rows)

    def to_json(self) -> dict[str, Any]:
        """Return the finder's evaluation and the stages as plain values."""
        stages = [
            {
                "k": stage.k,
                **stage.recall.to_json(),
                "pairs": stage.pairs,
                "seconds": stage.seconds,
                "estimated": stage.estimated,
            }
            for stage in self.stages
        ]
        finder = {**self.finder.to_json(), "seconds": self.seconds}
        return {
            "finder": finder,
            "judge": self.judge,
            "blend": self.blend,
            "threads": self.threads,
            "stages": stages,
        }


def rerank_models(
    source: str,
    finder: str,
    pairs: Pairs,
    top: int = TOP,
    efficiency: bool = False,
    blend: float | None = None,
    strict: bool = False,
) -> Reranked:
    """Open two models and re-rank: k of 1, 5, 10, 20, … below `top`, and `top`.

    Args:
        source: a fusion model.
        finder: a dual encoder.
        pairs: images and captions, usually one split of a dataset.
        top: the greatest k.
        efficiency: compute on one thread, so that the seconds compare with those of `compare`.
        blend: see `rerank`.
        strict: raise at the first image that cannot be read.

    Raises:
        ConfigError: `top` is below 1, or `blend` is not above 0.
        ModelError: a model does not load, or is not of the right kind.
    """
    if top < 1:
        raise ConfigError(f"--top {top}: re-rank at least 1 of each query's candidates")
    judge: Any = open_model(source, "matcher")
    first = open_model(finder, "encoder")
    depths = [k for k in (*DEPTHS, *FURTHER) if k < top] + [top]
    with one_thread() if efficiency else nullcontext():
        result = rerank(first, judge, pairs, depths, blend, strict)
    return replace(result, finder=result.finder.renamed(finder), judge=source)


def rerank(
    finder: Teacher,
    judge: Matcher,
    pairs: Pairs,
    depths: Sequence[int] = DEPTHS,
    blend: float | None = None,
    strict: bool = False,
) -> Reranked:
    """Find with one model, re-rank with another, for several k at once.

    What the greatest k needs is scored once, and serves all others. Of candidates that the
    finder scores the same, those that come first in the dataset count as nearer.

    Args:
        finder: a dual encoder.
        judge: a fusion model.
        pairs: images and captions, usually one split of a dataset.
        depths: the values of k; one above the number of candidates re-ranks them all.
        blend: a temperature. The finder's cosine over it is added to the judge's logit; None
            ranks by the judge alone.
        strict: raise at the first image that cannot be read.

    Raises:
        ConfigError: no k, one below 1, or a `blend` that is not above 0.
        DataError, ImageError, ModelError: see `score_matrix`.
    """
    if not depths or min(depths) < 1:
        raise ConfigError(f"re-rank the top {list(depths)}: each must be at least 1")
    if blend is not None and not blend > 0:
        raise ConfigError(f"--blend {blend:g}: a temperature, above 0")
    clean = readable(pairs, [finder.preprocess, judge.preprocess], strict)
    watch = Stopwatch()
    embedded = embed(finder, clean, watch=watch)
    with watch.running():
        cosines = embedded.image @ embedded.text.T
    depths, places = sorted(set(depths)), _Places(cosines)
    wanted = places.within(depths[-1])
    log.info("%s: %s passes of %s", judge.name, f"{int(wanted.sum()):,}", f"{wanted.numel():,}")
    scored = score(judge, clean, wanted)
    ranking = scored.scores if blend is None else scored.scores + cosines / blend
    stages = []
    for k in depths:
        count = int(places.within(k).sum())
        share = count / scored.passes
        seconds = watch.seconds + scored.towers + share * scored.matching
        recall = places.recall(cosines, ranking, embedded.truth, k)
        stages.append(Stage(k, recall, count, seconds, estimated=count < scored.passes))
    own = Evaluation(finder.name, from_scores(cosines, embedded.truth), finder.parameter_count())
    threads = torch.get_num_threads()
    readers: dict[str, TextReader] = {finder.name: finder, judge.name: judge}
    truncated = truncation_note(readers, captions(clean.examples)[0])
    return Reranked(
        own, judge.name, tuple(stages), watch.seconds, threads, clean.quarantine, blend, truncated
    )


class _Places:
    """The place of each candidate in the finder's order, 0 the nearest.

    Attributes:
        texts: (I, T) places of the captions of each image.
        images: (I, T) places of the images of each caption.
    """

    def __init__(self, cosines: Tensor) -> None:
        self.texts = _by_query(_places, cosines)
        self.images = _by_query(_places, cosines.T).T

    def within(self, k: int) -> Tensor:
        """Mark the pairs (I, T) among the first k of either direction."""
        return (self.texts < k) | (self.images < k)

    def recall(self, cosines: Tensor, scores: Tensor, truth: Truth, k: int) -> Retrieval:
        """Measure recall with the first k in the order of `scores`, the others in their own."""
        texts, images = self.texts < k, self.images < k
        i2t = from_scores(_merged(cosines, scores, texts), truth).i2t
        t2i = from_scores(_merged(cosines.T, scores.T, images.T).T, truth).t2i
        return Retrieval(i2t, t2i, len(cosines), len(truth.owner), truth.shared)


def _merged(cosines: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """Rank queries' candidates (Q, N), higher is better: the chosen ones above the others.

    Whole numbers, so that no score comes so near to another that rounding would tie the two.
    """
    return _by_query(_ranks, cosines, scores, chosen)


def _ranks(cosines: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    judged = _dense(scores.masked_fill(~chosen, -torch.inf))
    return torch.where(chosen, cosines.shape[1] + judged, _dense(cosines)).float()


def _dense(values: Tensor) -> Tensor:
    """Count the different values of its row that are below each: (Q, N) → int64, ties equal."""
    ordered, order = values.sort(dim=1)
    steps = torch.zeros_like(order)
    steps[:, 1:] = (ordered[:, 1:] > ordered[:, :-1]).cumsum(1)
    return torch.empty_like(order).scatter_(1, order, steps)


def _places(scores: Tensor) -> Tensor:
    """Number each row (Q, N) from its best, 0, → int32; of equals the first is the better."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    counted = torch.arange(scores.shape[1], dtype=torch.int32).expand_as(order)
    return torch.empty(order.shape, dtype=torch.int32).scatter_(1, order, counted)


def _by_query(job: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Do a job on (Q, N) matrices some rows at a time: sorting takes several times their memory."""
    step = max(1, BLOCK // max(1, matrices[0].shape[1]))
    blocks = zip(*(matrix.split(step) for matrix in matrices), strict=True)
    return torch.cat([job(*parts) for parts in blocks])


def _recalls(recall: Ranking) -> list[str]:
    return [f"{number:.2f}" for number in recall.figures]
