"""One model's recall and cost on one split, and the table that shows several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crosstill.data import Pairs
from crosstill.evaluate.cost import Cost, Efficiency
from crosstill.evaluate.embedding import Embedded, embed
from crosstill.evaluate.extended import Judged, Placed
from crosstill.evaluate.recall import DEPTHS, Retrieval, by_protocol
from crosstill.formats import aligned
from crosstill.images import Quarantine
from crosstill.teachers.base import Teacher

HEADINGS = (
    "model",
    "parameters",
    "image→text R@1",
    "R@5",
    "R@10",
    "text→image R@1",
    "R@5",
    "R@10",
    "RSUM",
)
LATENCY = ("ms/image", "ms/caption")
WHOLE = ("passes", "seconds", "times faster")


@dataclass(frozen=True)
class Evaluation:
    """A row of the table."""

    name: str
    recall: Retrieval
    parameters: int | None = None
    efficiency: Efficiency | None = None
    cost: Cost | None = None
    extended: tuple[Judged, ...] = ()  # against more than a caption's own image

    def renamed(self, name: str) -> Evaluation:
        """Return the same row under another name."""
        return replace(self, name=name)

    def to_json(self) -> dict[str, Any]:
        """Return recall at the top level (`i2t`, `t2i`, `rsum`, …), `truth`, and cost."""
        truth = {judged.name: judged.to_json() for judged in self.extended}
        return {**self.recall.to_json(), **({"truth": truth} if truth else {}), **_costs(self)}

    def cells(self, latency: bool) -> list[str]:
        """Return the row's text, column by column, up to RSUM or to the latency."""
        numbers = [f"{number:.2f}" for number in six(self.recall)]
        return _cells(self, [*numbers, f"{self.recall.rsum:.2f}"], latency)

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


def remarks(quarantine: Quarantine, images: int, shared: int = 0) -> list[str]:
    """List what a person should know of the images measured, and of those left out."""
    notes = [f"left out: {bad['path']}: {bad['reason']}" for bad in quarantine.rows]
    if quarantine.rows:
        notes.append(f"unreadable images left out: {len(quarantine)}")
    if images <= DEPTHS[-1]:
        notes.append(f"only {images} images: recall at {DEPTHS[-1]} is 100 for any model")
    if shared:
        notes.append(f"captions that several images share, each counted as true of all: {shared}")
    return notes


def table(rows: Sequence[Row]) -> str:
    """Format a Markdown table, one row a model, with times if any model has them."""
    latency, whole = any(row.efficiency for row in rows), any(row.cost for row in rows)
    heads = [*HEADINGS, *(LATENCY if latency else ()), *(WHOLE if whole else ())]
    body = [row.cells(latency) for row in rows]
    if whole:
        for row, cells in zip(rows, body, strict=True):
            cells += row.cost.cells() if row.cost else ["–"] * len(WHOLE)
    return aligned(heads, body)
