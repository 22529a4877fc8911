"""One model's recall on a split and what it costs, and the table that shows several side by side.

The cost is parameters, the time of one image and of one caption, and that of a whole set.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Self

import torch

from crosstill.data import Pairs
from crosstill.evaluate.embedding import Embedded, Stopwatch, embed
from crosstill.evaluate.extended import Judged, Placed
from crosstill.evaluate.recall import DEPTHS, Ranking, Retrieval, by_protocol
from crosstill.formats import aligned
from crosstill.images import Quarantine
from crosstill.pixels import count_left_out
from crosstill.teachers.base import Teacher

MODEL = ("model", "parameters")
HEADINGS = (*MODEL, *Retrieval.heads)
LATENCY = ("ms/image", "ms/caption")
WHOLE = ("passes", "seconds", "times faster")
CAPTION = "a brown dog runs after a red ball on the wet grass"


@dataclass(frozen=True)
class Efficiency:
    """Latency is the median of single items, on one thread, in milliseconds."""

    parameters: int
    image_ms: float
    caption_ms: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Cost:
    """The work of a whole set, from decoded pixels and plain text to all I x T scores.

    Attributes:
        passes: I + T of a dual encoder, I x T of a fusion model, whose towers are in `seconds`.
        seconds: wall time on one thread.
        sample: the pairs that were timed, where `seconds` is extrapolated from them.
        faster: how many times quicker than the slowest model beside it.
        rough: whether `faster` rests on an extrapolation.
    """

    passes: int
    seconds: float
    sample: int | None = None
    faster: float = 1.0
    rough: bool = False

    @property
    def estimated(self) -> bool:
        """Whether the seconds are extrapolated."""
        return self.sample is not None

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "estimated": self.estimated}
        return {key: value for key, value in values.items() if value is not None}

    def cells(self) -> list[str]:
        """Format passes, seconds and how many times faster for a table."""
        mark, ratio = "≈" * self.estimated, "≈" * self.rough
        return [f"{self.passes:,}", mark + figure(self.seconds), ratio + figure(self.faster)]


@dataclass(frozen=True)
class Evaluation:
    """A row of the table."""

    name: str
    recall: Ranking
    parameters: int | None = None
    efficiency: Efficiency | None = None
    cost: Cost | None = None
    extended: tuple[Judged, ...] = ()  # against more than a caption's own image

    def renamed(self, name: str) -> Self:
        """Return the same row under another name."""
        return replace(self, name=name)

    def to_json(self) -> dict[str, Any]:
        """Return recall at the top level (`i2t`, `t2i`, `rsum`, …), `truth`, and cost."""
        truth = {judged.name: judged.to_json() for judged in self.extended}
        return {**self.recall.to_json(), **({"truth": truth} if truth else {}), **_costs(self)}

    def cells(self, latency: bool) -> list[str]:
        """Return the row's text, column by column, up to RSUM or to the latency."""
        return _cells(self, [f"{number:.2f}" for number in self.recall.figures], latency)

    @property
    def heads(self) -> tuple[str, ...]:
        """Headings of the row's cells, without latency."""
        return *MODEL, *self.recall.heads

    def __str__(self) -> str:
        return table([self])


@dataclass(frozen=True)
class Timed:
    """A row of a model whose recall was not measured."""

    name: str
    parameters: int | None = None
    efficiency: Efficiency | None = None
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return name, parameters and cost."""
        return _costs(self)

    @property
    def heads(self) -> tuple[str, ...]:
        """As `Evaluation.heads`."""
        return HEADINGS

    def cells(self, latency: bool) -> list[str]:
        """As `Evaluation.cells`."""
        return _cells(self, ["–"] * 7, latency)


Row = Evaluation | Timed


def six(recall: Retrieval) -> tuple[float, ...]:
    """Return the six recalls in the table's order."""
    return (*recall.i2t.fair, *recall.t2i.fair)


def _costs(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {"model": row.name, "parameters": row.parameters}
    if row.efficiency is not None:
        values["efficiency"] = row.efficiency.to_json()
    if row.cost is not None:
        values["cost"] = row.cost.to_json()
    return values


def _cells(row: Row, numbers: list[str], latency: bool) -> list[str]:
    count = f"{row.parameters:,}" if row.parameters is not None else "–"
    cost = row.efficiency
    times = [f"{cost.image_ms:.2f}", f"{cost.caption_ms:.2f}"] if cost else ["–", "–"]
    return [row.name, count, *numbers, *(times if latency else [])]


def retrieval(
    model: Teacher, pairs: Pairs, protocol: str = "full", strict: bool = False
) -> Evaluation:
    """Measure a model's recall on the images and captions of `pairs`, usually one split of it.

    Raises:
        ModelError, DataError, ImageError: see `crosstill.evaluate.embed`.
        ConfigError: no such protocol, or one that the data does not fit.
    """
    return judge(model, embed(model, pairs, strict), protocol)


def judge(
    model: Teacher, rows: Embedded, protocol: str = "full", placed: Sequence[Placed] = ()
) -> Evaluation:
    """Evaluate embeddings that are already there, against further truths if any."""
    recall = by_protocol(protocol, rows.image, rows.text, rows.truth)
    extended = tuple(truth.of_features(rows.image, rows.text) for truth in placed)
    return Evaluation(model.name, recall, model.parameter_count(), extended=extended)


def compared(costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Add to each cost how many times faster it is than the slowest."""
    slowest = max(costs.values(), key=lambda cost: cost.seconds)
    return {
        name: replace(
            cost,
            faster=slowest.seconds / cost.seconds,
            rough=cost is not slowest and (cost.estimated or slowest.estimated),
        )
        for name, cost in costs.items()
    }


def figure(value: float) -> str:
    """Format a number with as many digits as it is worth: 0.123, 12.3, 1,230."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_latency(
    models: Mapping[str, Teacher], caption: str = CAPTION, repeats: int = 30
) -> dict[str, Efficiency]:
    """Time every model in turn, round after round, so that a noisy machine is noisy to all.

    Args:
        models: name → model; pixels are random, at the model's own size, already decoded.
        caption: what to encode, tokenization included.
        repeats: rounds; the first two are not counted.
    """
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        pixels = torch.randint(0, 256, (1, 3, *model.preprocess.size), dtype=torch.uint8)
        jobs[name, "image"] = partial(model.embed_images, pixels)
        jobs[name, "caption"] = partial(model.embed_texts, [caption])
    times: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    with one_thread():
        for _ in range(repeats + 2):
            for key, job in jobs.items():
                watch = Stopwatch()
                with watch.running():
                    job()
                times[key].append(1000 * watch.seconds)
    return {
        name: Efficiency(
            model.parameter_count(),
            median(times[name, "image"][2:]),
            median(times[name, "caption"][2:]),
        )
        for name, model in models.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def remarks(quarantine: Quarantine, images: int, shared: int = 0) -> list[str]:
    """List what a person should know of the images measured, and of those left out."""
    notes = [f"left out: {bad['path']}: {bad['reason']}" for bad in quarantine.rows]
    if quarantine.rows:
        notes.append(count_left_out(row["class"] for row in quarantine.rows))
    if images <= DEPTHS[-1]:
        notes.append(f"only {images} images: recall at {DEPTHS[-1]} is 100 for any model")
    if shared:
        notes.append(f"captions that several images share, each counted as true of all: {shared}")
    return notes


def table(rows: Sequence[Row]) -> str:
    """Format a Markdown table, one row a model, with times if any model has them."""
    latency, whole = any(row.efficiency for row in rows), any(row.cost for row in rows)
    heads = [*rows[0].heads, *(LATENCY if latency else ()), *(WHOLE if whole else ())]
    body = [row.cells(latency) for row in rows]
    if whole:
        for row, cells in zip(rows, body, strict=True):
            cells += row.cost.cells() if row.cost else ["–"] * len(WHOLE)
    return aligned(heads, body)
