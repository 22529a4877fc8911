"""A finished table: mean and spread over seeds, and what chance could have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from crosstill import formats
from crosstill.evaluate.bootstrap import Difference
from crosstill.evaluate.recall import Retrieval

HEADINGS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "RSUM")
ALPHA = 0.05  # a difference is marked when chance gives one as large less often than this


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, and the sample's standard deviation; None where there is one seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        name: what the table calls it.
        recalls: R@1, R@5, R@10 of images finding captions, then of captions finding images.
        rsum: their sum.
        difference: from the reference row, by paired bootstrap; None for that row itself.
        paper: the RSUM that the paper reports for it on its own data, if it does.
        runs: the run folders, one a seed.
        minutes: of the clock, mean over seeds.
    """

    name: str
    recalls: tuple[Cell, ...]
    rsum: Cell
    difference: Difference | None
    paper: float | None
    runs: tuple[Path, ...]
    minutes: float

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recalls": [asdict(cell) for cell in self.recalls],
            "rsum": asdict(self.rsum),
            "difference": asdict(self.difference) if self.difference else None,
            "paper": self.paper,
            "runs": [str(run) for run in self.runs],
            "minutes": self.minutes,
        }


@dataclass(frozen=True)
class Table:
    """Rows of one table of one grid.

    Attributes:
        name: such as "table4".
        title: what it compares.
        note: what the reader has to know about it.
        reference: name of the row that the others are tested against.
        rows: in the order of the paper.
        teacher: its recall on the same split, from the cache; None if it left only one side, or
            scores of pairs to a dual encoder.
        teacher_name: of the model that filled the cache.
        split: what the figures were measured on.
        seeds: one run each.
        settings: what all rows share.
        command: what the user typed.
    """

    name: str
    title: str
    note: str
    reference: str
    rows: tuple[Row, ...]
    teacher: Retrieval | None
    teacher_name: str
    split: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    command: str

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and text of the table, the teacher first."""
        paper = any(row.paper is not None for row in self.rows)
        heads = ["", *HEADINGS, f"against {self.reference}", *(["paper*"] if paper else [])]
        body = [self._teacher_cells(paper)] if self.teacher else []
        for row in self.rows:
            theirs = [f"{row.paper:.1f}" if row.paper is not None else "–"] if paper else []
            cells = [*map(str, row.recalls), str(row.rsum), verdict(row.difference), *theirs]
            body.append([row.name, *cells])
        return heads, body

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = {
            k: getattr(self, k) for k in ("name", "title", "note", "reference", "teacher_name")
        }
        return {
            **plain,
            "split": self.split,
            "seeds": list(self.seeds),
            "settings": self.settings,
            "command": self.command,
            "teacher": self.teacher.to_json() if self.teacher else None,
            "rows": [row.to_json() for row in self.rows],
        }

    def _teacher_cells(self, paper: bool) -> list[str]:
        assert self.teacher is not None
        numbers = (*self.teacher.i2t.fair, *self.teacher.t2i.fair, self.teacher.rsum)
        blank = ["–", *(["–"] if paper else [])]
        return [f"teacher ({self.teacher_name})", *(f"{n:.2f}" for n in numbers), *blank]


def verdict(difference: Difference | None) -> str:
    """The difference with its 95 % interval; a star where chance is an unlikely reason."""
    if difference is None:
        return "reference"
    star = " ★" if difference.p < ALPHA else ""
    low, high = f"{difference.low:+.2f}", f"{difference.high:+.2f}"
    return f"{difference.rsum:+.2f} [{low}, {high}]{star}".replace("-", "−")


def markdown(table: Table) -> str:
    """The table with what is needed to read it."""
    body = formats.markdown(*table.cells())
    return "\n".join([f"**{table.title}**", "", body, "", legend(table), ""])


def legend(table: Table) -> str:
    """How to read the columns, in sentences."""
    spread = "mean ± standard deviation over the seeds " if len(table.seeds) > 1 else "the seed "
    text = (
        f"Split {table.split!r}; {spread}{', '.join(map(str, table.seeds))}. In brackets the 95 % "
        "interval of the difference in RSUM over resampled images with their captions (paired; "
        f"seeds averaged); ★ where p < {ALPHA}."
    )
    if any(row.paper is not None for row in table.rows):
        text += (
            " *RSUM in the paper, on Flickr30k with a larger teacher and student: not "
            "comparable with ours, only their order is."
        )
    return f"{text} {table.note}".strip()


def latex(table: Table) -> str:
    """A LaTeX tabular (booktabs) of the same cells."""
    return formats.latex(table.title, *table.cells())
