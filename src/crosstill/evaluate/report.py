"""One model's recall and cost on one split, and the table that shows several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from crosstill.data import Pairs
from crosstill.evaluate import protocols
from crosstill.evaluate.efficiency import Efficiency
from crosstill.evaluate.encode import Embedded, embed
from crosstill.evaluate.recall import Retrieval
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


@dataclass(frozen=True)
class Evaluation:
    """A row of the table."""

    name: str
    recall: Retrieval
    parameters: int | None = None
    efficiency: Efficiency | None = None

    def renamed(self, name: str) -> Evaluation:
        """The same row under another name."""
        return replace(self, name=name)

    def to_json(self) -> dict[str, Any]:
        """Recall at the top level (`i2t`, `t2i`, `rsum`, …), then what is known of the cost."""
        cost: dict[str, Any] = {"model": self.name, "parameters": self.parameters}
        if self.efficiency is not None:
            cost["efficiency"] = self.efficiency.to_json()
        return {**self.recall.to_json(), **cost}

    def cells(self, latency: bool) -> list[str]:
        """The row's text, column by column."""
        i2t, t2i = self.recall.i2t, self.recall.t2i
        numbers = (i2t.r1, i2t.r5, i2t.r10, t2i.r1, t2i.r5, t2i.r10, self.recall.rsum)
        count = f"{self.parameters:,}" if self.parameters is not None else "–"
        cost = self.efficiency
        times = [f"{cost.image_ms:.2f}", f"{cost.caption_ms:.2f}"] if cost else ["–", "–"]
        return [self.name, count, *(f"{n:.2f}" for n in numbers), *(times if latency else [])]

    def __str__(self) -> str:
        return table([self])


def retrieval(
    model: Teacher, pairs: Pairs, protocol: str = "full", strict: bool = False
) -> Evaluation:
    """Measure a model's recall on the images and captions of `pairs`, usually one split of it.

    Raises:
        ModelError, DataError, ImageError: see `crosstill.evaluate.embed`.
        ConfigError: no such protocol, or one that the data does not fit.
    """
    return judge(model, embed(model, pairs, strict), protocol)


def judge(model: Teacher, rows: Embedded, protocol: str = "full") -> Evaluation:
    """The evaluation of embeddings that are already there."""
    found = protocols.run(protocol, rows.image, rows.text, rows.owner)
    return Evaluation(model.name, found, model.parameter_count())


def table(rows: Sequence[Evaluation]) -> str:
    """A Markdown table, one row a model; times are shown if any model has them."""
    latency = any(row.efficiency for row in rows)
    heads = [*HEADINGS, *(LATENCY if latency else ())]
    body = [row.cells(latency) for row in rows]
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_line(cells, widths) for cells in [heads, rule, *body])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"
