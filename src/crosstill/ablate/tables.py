"""Tables: the settings that they compare, and what they are once their runs are finished.

The settings are those of the DSMD paper (arXiv 2404.10838), and one table is for score caches.

The figures beside them are the paper's RSUM on Flickr30k's 1,000 test images, for a ViT-B/16 and
BERT-base student of BEiT-3. They are shown in a column of their own and never enter a comparison.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

from crosstill import formats
from crosstill.errors import unknown
from crosstill.evaluate.bootstrap import Difference
from crosstill.evaluate.recall import Retrieval
from crosstill.recipes import recommended

HEADINGS = ("i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10", "RSUM")
ALPHA = 0.05  # a difference is marked when chance gives one as large less often than this
LOSSES = {"CD": "contrastive", "FD": "feature", "SD": "similarity", "HND": "hard_negative"}


@dataclass(frozen=True)
class Setting:
    """One row: a recipe and what it changes.

    Attributes:
        name: what the table calls it.
        recipe: where it starts.
        changes: `key=value` texts.
        paper: the paper's RSUM.
        student: a preset or TOML file; None for the student that the user chose.
        queue: slots that the row gives its queue, where the table varies them; the row is left out
            where there are fewer training captions.
        raw: whether it takes a cache that keeps the teacher's raw rows; else it is left out.
    """

    name: str
    recipe: str = "dsmd"
    changes: tuple[str, ...] = ()
    paper: float | None = None
    student: str | None = None
    queue: int = 0
    raw: bool = False


@dataclass(frozen=True)
class Design:
    """A table before it is run.

    Attributes:
        title: what it compares.
        reference: names the row that others are tested against.
        rows: its settings.
        note: what the reader has to know about it.
        student: of all rows, if the user chooses none.
        lists: whether it compares ways to learn candidate lists, which takes a score cache.
        shared: `key=value` texts for all rows, which the user may change.
    """

    title: str
    reference: str
    rows: tuple[Setting, ...]
    note: str = ""
    student: str = "mobile"
    lists: bool = False
    shared: tuple[str, ...] = ()


def table2() -> Design:
    """Every method on one student, with the optimizer and the start of `recommended`."""
    base = recommended()
    optimizer = ("lr", "schedule", "warmup_share", "epochs", "batch_size", "shuffle")
    fields = (*optimizer, "init_heads", "dropout")
    shared = tuple(f"{field}={json.dumps(getattr(base, field))}" for field in fields)
    as_published = (
        "losses.hard_negative.margin=0",
        "losses.hard_negative.mask_same_image=false",
        "losses.contrastive.mask_same_image=false",
        "center=false",
    )
    rows = (
        Setting("recommended", "recommended"),
        Setting("DSMD, margin 0.2", "dsmd"),
        Setting("DSMD, as published", "dsmd", as_published, paper=528.8),
        Setting("DSMD, released code", "dsmd_released"),
        Setting("CLIP-KD", "clip_kd", paper=513.5),
        Setting("KD", "kd", paper=444.4),
        Setting("FSP", "fsp", paper=513.8),
        Setting("DCD", "dcd", paper=484.5),
        Setting("RKD", "rkd"),
        Setting("DKD", "dkd"),
        Setting("CRD", "crd"),
        Setting("CPRD", "cprd"),
        Setting("InfoNCE, no teacher", "info_nce"),
    )
    return Design("Methods on one student", "recommended", rows, shared=shared)


def table4() -> Design:
    """All 15 combinations of the four losses, balanced as published.

    Of the paper's figures we have nine: those of the six pairs are in no source that we could read.
    """
    paper = {
        "CD": 503.2, "FD": 501.4, "SD": 506.4, "HND": 426.7, "FD + SD + HND": 524.2,
        "CD + SD + HND": 492.9, "CD + FD + HND": 523.3, "CD + FD + SD": 519.3,
        "CD + FD + SD + HND": 528.8,
    }  # fmt: skip
    rows = []
    for count in range(1, 5):
        for chosen in combinations(LOSSES, count):
            name = " + ".join(chosen)
            losses = "+".join(LOSSES[part] for part in chosen)
            rows.append(Setting(name, changes=(f"losses={losses}",), paper=paper.get(name)))
    return Design("Which of the four losses", rows[-1].name, tuple(rows))


def table5() -> Design:
    """Balancers: off, as released, as published, and three others."""
    rows = (
        Setting("off (all weights 1)", changes=("balance=fixed",), paper=448.1),
        Setting("DSMD, as released", changes=("balance=dsmd_scaled",)),
        Setting("DSMD, as published", paper=528.8),
        Setting("DSMD, smoothed 0.9", changes=("balance.smoothing=0.9",)),
        Setting("DWA", changes=("balance=dwa",)),
        Setting("uncertainty", changes=("balance=uncertainty",)),
        Setting("GradNorm", changes=("balance=gradnorm",)),
    )
    return Design("Balancers", "DSMD, as published", rows)


def table6() -> Design:
    """L2 normalisation of what the losses compare."""
    rows = (
        Setting("both normalised", paper=528.8),
        Setting("student not", changes=("normalise=teacher",)),
        Setting("neither", changes=("normalise=false",), paper=318.9, raw=True),
    )
    note = "Whose rows losses see at length 1; recall is by cosine in every row."
    return Design("L2 normalisation", "both normalised", rows, note)


def _sweep(title: str, symbol: str, key: str, values: Mapping[Any, float], usual: float) -> Design:
    """Vary one option over several values, each spelt out, against the usual one."""
    rows = tuple(
        Setting(f"{symbol} = {value:g}", changes=(f"{key}={value}",), paper=paper)
        for value, paper in values.items()
    )
    return Design(title, f"{symbol} = {usual:g}", rows)


def table7() -> Design:
    """The contrastive temperature."""
    values = {0.05: 528.8, 0.2: 521.1, 0.5: 522.6, 1.0: 521.7}
    return _sweep("Contrastive temperature", "τ", "losses.contrastive.temperature", values, 0.05)


def table8() -> Design:
    """The queue's length."""
    values = {1024: 525.4, 2048: 526.3, 4096: 528.4, 8192: 528.8, 16384: 525.0}
    what = _sweep("Queue length", "K", "losses.contrastive.queue_size", values, 8192)
    rows = zip(what.rows, values, strict=True)
    return replace(what, rows=tuple(replace(row, queue=slots) for row, slots in rows))


def table9() -> Design:
    """The margin of the hard negatives."""
    values = {0.0: 528.8, 0.05: 518.6, 0.2: 522.9, 0.5: 521.7, 1.0: 522.7}
    what = _sweep("Margin", "m", "losses.hard_negative.margin", values, 0.2)
    return replace(what, note="The paper's own is 0, `dsmd` has 0.2: docs/training.md says why.")


def table10() -> Design:
    """The balancer's temperature, which the released code cannot respond to."""
    values = {0.05: 447.5, 0.2: 511.0, 0.5: 526.4, 1.0: 528.8}
    return _sweep("Balancer temperature", "T", "balance.temperature", values, 1.0)


def towers() -> Design:
    """Pairs of towers: of one family and mixed, as large as each other, and a very small one."""
    rows = (
        Setting("ViT + BERT", student="paper"),
        Setting("CNN + BERT", student="cnn-bert"),
        Setting("DeiT + ALBERT, very small", student="deit-albert"),
    )
    note = (
        "The paper finds that towers of one family distil better than mixed ones. ViT-B/16 and "
        "ConvNeXt-B are of one size, so that the first two rows differ in family alone; the last "
        "has a twelfth of their parameters and says what size costs."
    )
    return Design("Towers", rows[0].name, rows, note)


def dcd() -> Design:
    """DCD's two parts (arXiv 2207.01426), one by one: its negatives, and its weights."""
    anyhow, plain = "negatives=random", 'losses.dcd.variant="plain"'
    rows = (
        Setting("hardest + dynamic", "dcd"),
        Setting("hardest + plain", "dcd", (plain,)),
        Setting("random + dynamic", "dcd", (anyhow,)),
        Setting("random + plain", "dcd", (anyhow, plain)),
    )
    note = (
        "Negatives of a query: of its candidates in the score cache those that the teacher scores "
        "highest, or as many drawn at random. Weights of a query: dynamic, by how unsure the "
        "teacher is of it, or plain, the same for all."
    )
    title = "Hard negatives and dynamic weights of DCD"
    return Design(title, rows[0].name, rows, note, student="half", lists=True)


TABLES: dict[str, Callable[[], Design]] = {
    make.__name__: make
    for make in (table2, table4, table5, table6, table7, table8, table9, table10, towers, dcd)
}


def design(name: str) -> Design:
    """Make a table's design.

    Raises:
        ConfigError: there is no such table.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]()


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, and the sample's standard deviation; None where there is one seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
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
        parameters: of the student; None where its run is gone.
    """

    name: str
    recalls: tuple[Cell, ...]
    rsum: Cell
    difference: Difference | None
    paper: float | None
    runs: tuple[Path, ...]
    minutes: float
    parameters: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recalls": [asdict(cell) for cell in self.recalls],
            "rsum": asdict(self.rsum),
            "difference": asdict(self.difference) if self.difference else None,
            "paper": self.paper,
            "runs": [str(run) for run in self.runs],
            "minutes": self.minutes,
            "parameters": self.parameters,
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
        teacher_parameters: of that model; None where it is not known, as of vectors.
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
    teacher_parameters: int | None = None

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and text of the table, the teacher first.

        Sizes of students have a column where they differ.
        """
        paper = any(row.paper is not None for row in self.rows)
        sized = len({row.parameters for row in self.rows}) > 1
        heads = ["", *(["parameters"] if sized else []), *HEADINGS, f"against {self.reference}"]
        heads += ["paper*"] if paper else []
        body = [self._teacher_cells(sized, paper)] if self.teacher else []
        for row in self.rows:
            size = [_count(row.parameters)] if sized else []
            reported = [f"{row.paper:.1f}" if row.paper is not None else "–"] if paper else []
            cells = [*map(str, row.recalls), str(row.rsum), verdict(row.difference), *reported]
            body.append([row.name, *size, *cells])
        return heads, body

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
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

    def _teacher_cells(self, sized: bool, paper: bool) -> list[str]:
        assert self.teacher is not None
        size = [_count(self.teacher_parameters)] if sized else []
        numbers = (*self.teacher.i2t.fair, *self.teacher.t2i.fair, self.teacher.rsum)
        blank = ["–", *(["–"] if paper else [])]
        return [f"teacher ({self.teacher_name})", *size, *(f"{n:.2f}" for n in numbers), *blank]


def _count(parameters: int | None) -> str:
    return f"{parameters:,}" if parameters is not None else "–"


def verdict(difference: Difference | None) -> str:
    """Write a difference with its 95 % interval; a star where chance is an unlikely reason."""
    if difference is None:
        return "reference"
    star = " ★" if difference.p < ALPHA else ""
    low, high = f"{difference.low:+.2f}", f"{difference.high:+.2f}"
    return f"{difference.rsum:+.2f} [{low}, {high}]{star}".replace("-", "−")


def markdown(table: Table) -> str:
    """Write a table as Markdown, with what is needed to read it."""
    body = formats.markdown(*table.cells())
    return "\n".join([f"**{table.title}**", "", body, "", legend(table), ""])


def legend(table: Table) -> str:
    """Explain the columns, in sentences."""
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
    """Write the same cells as a LaTeX tabular (booktabs)."""
    return formats.latex(table.title, *table.cells())
