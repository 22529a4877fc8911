"""The tables of the DSMD paper (arXiv 2404.10838) as lists of settings, and one for score caches.

The figures beside them are the paper's RSUM on Flickr30k's 1,000 test images, for a ViT-B/16 and
BERT-base student of BEiT-3. They are shown in a column of their own and never enter a comparison.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from crosstill.errors import unknown

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
    """

    name: str
    recipe: str = "dsmd"
    changes: tuple[str, ...] = ()
    paper: float | None = None
    student: str | None = None


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
    """

    title: str
    reference: str
    rows: tuple[Setting, ...]
    note: str = ""
    student: str = "mobile"
    lists: bool = False


def table2() -> Design:
    """Every method on one student."""
    rows = (
        Setting("DSMD", "dsmd", paper=528.8),
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
    return Design("Methods on one student", "DSMD", rows)


def table4() -> Design:
    """All 15 combinations of the four losses, balanced as published."""
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
        Setting("normalised", paper=528.8),
        Setting("not normalised", changes=("normalise=false",), paper=318.9),
    )
    return Design("L2 normalisation", "normalised", rows)


def _sweep(title: str, symbol: str, key: str, values: Mapping[Any, float], usual: float) -> Design:
    """One option over several values; the usual one is the recipe's own."""
    rows = tuple(
        Setting(f"{symbol} = {v:g}", changes=() if v == usual else (f"{key}={v}",), paper=p)
        for v, p in values.items()
    )
    return Design(title, f"{symbol} = {usual:g}", rows)


def table7() -> Design:
    """The contrastive temperature."""
    values = {0.05: 528.8, 0.2: 521.1, 0.5: 522.6, 1.0: 521.7}
    return _sweep("Contrastive temperature", "τ", "losses.contrastive.temperature", values, 0.05)


def table8() -> Design:
    """The queue's length."""
    values = {1024: 525.4, 2048: 526.3, 4096: 528.4, 8192: 528.8, 16384: 525.0}
    return _sweep("Queue length", "K", "losses.contrastive.queue_size", values, 8192)


def table9() -> Design:
    """The margin of the hard negatives."""
    values = {0.0: 528.8, 0.05: 518.6, 0.2: 522.9, 0.5: 521.7, 1.0: 522.7}
    return _sweep("Margin", "m", "losses.hard_negative.margin", values, 0.0)


def table10() -> Design:
    """The balancer's temperature, which the released code cannot respond to."""
    values = {0.05: 447.5, 0.2: 511.0, 0.5: 526.4, 1.0: 528.8}
    return _sweep("Balancer temperature", "T", "balance.temperature", values, 1.0)


def towers() -> Design:
    """Pairs of towers: one family, mixed, and very small."""
    rows = (
        Setting("ViT + BERT", student="paper"),
        Setting("CNN + BERT", student="cnn-bert"),
        Setting("DeiT + ALBERT", student="deit-albert"),
    )
    note = "The paper finds that towers of one family distil better than mixed ones."
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
    """A table's rows.

    Raises:
        ConfigError: there is no such table.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]()
