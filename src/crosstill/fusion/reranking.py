"""Two-stage retrieval: a dual encoder finds the top k, a fusion model puts them in order.

Both directions have candidates of their own: the k captions nearest to each image, the k images
nearest to each caption. All other candidates stay behind these, in the finder's order.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosstill.data import Pairs
from crosstill.errors import ConfigError
from crosstill.evaluate.embedding import Stopwatch, captions, embed, readable
from crosstill.evaluate.evaluation import (
    HEADINGS,
    Evaluation,
    figure,
    one_thread,
    remarks,
    six,
)
from crosstill.evaluate.recall import Retrieval, from_scores
from crosstill.evaluate.truth import Truth
from crosstill.formats import aligned
from crosstill.fusion import measure
from crosstill.fusion.matcher import Matcher
from crosstill.images import Quarantine
from crosstill.models import open as open_model
from crosstill.teachers.base import Teacher, TextReader, truncation_note

log = logging.getLogger(__name__)

DEPTHS = (1, 5, 10, 20, 50)
FURTHER = (100, 200, 500, 1000)
TOP = 20
BLOCK = 2**24  # scores that are sorted together


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


def run(
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
        DataError, ImageError, ModelError: see `crosstill.fusion.measure.score_matrix`.
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
    scored = measure.score(judge, clean, wanted)
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


def _recalls(recall: Retrieval) -> list[str]:
    return [f"{number:.2f}" for number in (*six(recall), recall.rsum)]
