"""Curves of a run's log (events.jsonl): losses, weights and RSUM, read and drawn."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crosstill import artefacts
from crosstill.errors import CorruptError, InputError
from crosstill.evaluate import agreement
from crosstill.evaluate.likeness import NAMES
from crosstill.report.pictures import Picture, Theme, picture, scale

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass
class Curve:
    """Values over steps, or over epochs."""

    at: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: int, value: float) -> None:
        self.at.append(int(at))
        self.values.append(float(value))


@dataclass(frozen=True)
class Events:
    """Every curve of one run: losses and weights over steps, a figure on val over epochs.

    Attributes:
        rsum: the figure by which the best epoch was chosen: RSUM, or without pairs the agreement.
        cosines: mean cosines of the student's rows on val over epochs, by side; empty of a run
            that kept none.
    """

    losses: dict[str, Curve]
    weights: dict[str, Curve]
    rsum: Curve
    cosines: dict[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Bins:
    """A curve in few points: of each bin of steps its middle, its mean, its extremes."""

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read(folder: Path) -> Events:
    """Read the curves of the run in a folder.

    Raises:
        InputError: it has no events.jsonl.
        CorruptError: a line of it is no JSON, or not one that crosstill wrote.
    """
    path = artefacts.member(folder, "events.jsonl")
    if not path.is_file():
        raise InputError(f"{path}: the run's log is gone; restore it, or run it again")
    events = Events({}, {}, Curve())
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            _add(events, json.loads(line))
        except _DAMAGED:
            raise CorruptError(
                f"{path}, line {number}: not a line of a run's log; restore it from a copy"
            ) from None
    return events


def _add(events: Events, event: dict[str, Any]) -> None:
    if event["kind"] == "epoch":
        (key,) = agreement.NAMES.keys() & event["val"].keys()
        events.rsum.add(event["epoch"], event["val"][key])
        kept = event.get("mean_cosine", {})  # not in older runs
        for side in NAMES.keys() & kept.keys():
            events.cosines.setdefault(side, Curve()).add(event["epoch"], kept[side])
        return
    for curves, values in ((events.losses, event["losses"]), (events.weights, event["weights"])):
        for name, value in values.items():
            curves.setdefault(name, Curve()).add(event["step"], value)


def bins(curve: Curve, most: int = 120) -> Bins:
    """Cut a curve into at most so many bins; of a shorter one every point is its own bin."""
    count = min(most, len(curve.at))
    parts = np.array_split(np.asarray(curve.values, dtype=float), count)
    steps = np.array_split(np.asarray(curve.at, dtype=float), count)
    return Bins(
        np.array([part.mean() for part in steps]),
        np.array([part.mean() for part in parts]),
        np.array([part.min() for part in parts]),
        np.array([part.max() for part in parts]),
    )


def mean(curves: Sequence[Curve]) -> Curve:
    """Average the curves of several seeds, over the epochs that all of them reached."""
    shared = sorted(set.intersection(*(set(curve.at) for curve in curves)))
    each = [dict(zip(curve.at, curve.values, strict=True)) for curve in curves]
    return Curve(shared, [sum(by[at] for by in each) / len(each) for at in shared])


def curve_names(curves: Iterable[Mapping[str, Curve]]) -> list[str]:
    """List the names among several runs' curves, in the order of their first appearance."""
    return list(dict.fromkeys(name for by_name in curves for name in by_name))


WIDE = 20  # weights that span more than this factor get a log axis


def over_steps(curves: Mapping[str, Curve], what: str) -> list[Picture]:
    """Draw a picture of each curve; positive losses on a log axis.

    Args:
        curves: by name of the loss.
        what: "loss" or "weight".
    """
    return [_one(name, curve, what, number) for number, (name, curve) in enumerate(curves.items())]


def _one(name: str, curve: Curve, what: str, number: int) -> Picture:
    low, high = min(curve.values), max(curve.values)
    log = low > 0 and (what == "loss" or high > WIDE * low)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, f"{what}: {name}", "step")
        _line(axes, bins(curve), theme.line(number))
        scale(axes, low, high, log)

    alt = (
        f"{what.capitalize()} {name} at {len(curve.at)} logged steps{', log axis' if log else ''}: "
        f"first {curve.values[0]:.4g}, last {curve.values[-1]:.4g}, "
        f"lowest {low:.4g}, highest {high:.4g}."
    )
    return picture(draw, alt, height=2.2)


def _axes(figure: Figure, title: str, below: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return axes


def _line(axes: Axes, bins: Bins, color: str, dash: str = "-", label: str | None = None) -> None:
    """Draw the mean of the bins, in the band between their lowest and highest."""
    dot = "o" if len(bins.at) == 1 else ""
    axes.fill_between(bins.at, bins.low, bins.high, color=color, alpha=0.22, linewidth=0)
    axes.plot(bins.at, bins.mean, color=color, linestyle=dash, marker=dot, label=label)


def of_val(curve: Curve, teacher: float | None, what: str) -> Picture:
    """Draw the figure on val, `what`, over epochs, with the teacher's as a line across."""
    best = max(range(len(curve.at)), key=curve.values.__getitem__)
    values = [*curve.values, *([teacher] if teacher is not None else [])]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, what, "epoch")
        axes.plot(curve.at, curve.values, "o-", color=theme.line(0), markersize=4, label="student")
        _teacher(axes, teacher, theme)
        _whole(axes, curve)
        scale(axes, min(values), max(values), log=False)
        _legend(figure)

    beside = "" if teacher is None else f" The teacher's is {teacher:.2f}."
    alt = (
        f"{what} after {len(curve.at)} epochs: {curve.values[-1]:.2f}, "
        f"best {curve.values[best]:.2f} at epoch {curve.at[best]}.{beside}"
    )
    return picture(draw, alt, height=2.8)


def of_cosines(
    curves: Mapping[str, Curve], teacher: Mapping[str, float], split: str
) -> list[Picture]:
    """Draw the student's mean cosine over epochs, a picture a side, the teacher's as a line.

    Args:
        curves: by side, "image" or "text".
        teacher: its mean cosine, of the sides that it has.
        split: on which they were measured.
    """
    sides = [side for side in NAMES if side in curves]
    return [_cosine(side, curves[side], teacher.get(side), split) for side in sides]


def _cosine(side: str, curve: Curve, teacher: float | None, split: str) -> Picture:
    title = f"mean cosine of {NAMES[side]} on {split}"

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, title, "epoch")
        axes.plot(curve.at, curve.values, "o-", color=theme.line(0), markersize=4, label="student")
        _teacher(axes, teacher, theme)
        _whole(axes, curve)
        axes.set_ylim(min(0.0, teacher or 0.0, *curve.values) - 0.05, 1.05)
        _legend(figure)

    beside = "" if teacher is None else f" The teacher's is {teacher:.2f}."
    return picture(draw, f"{title.capitalize()}: {curve.values[-1]:.2f} at the end.{beside}", 2.8)


def _whole(axes: Axes, curve: Curve) -> None:
    """Leave room around a single epoch, which would otherwise get ticks at fractions of it."""
    if len(set(curve.at)) == 1:
        axes.set_xlim(curve.at[0] - 0.5, curve.at[0] + 0.5)
        axes.set_xticks([curve.at[0]])


def _teacher(axes: Axes, rsum: float | None, theme: Theme) -> None:
    if rsum is not None:
        axes.axhline(rsum, color=theme.ink, linestyle="--", linewidth=1.2, label="teacher")


def _legend(figure: Figure) -> None:
    """Put the legend below the axes, where it can hide nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, handlelength=2.6)


def of_rows(rows: Mapping[str, Sequence[Curve]], teacher: float | None) -> list[Picture]:
    """Draw RSUM over epochs, a picture a row of a table: seeds, mean, all other means grey."""
    means = {name: mean(seeds) for name, seeds in rows.items()}
    values = [v for seeds in rows.values() for curve in seeds for v in curve.values]
    values += [teacher] if teacher is not None else []
    within = min(values), max(values)
    return [_row(name, number, rows, means, (teacher, within)) for number, name in enumerate(rows)]


def _row(
    name: str,
    number: int,
    rows: Mapping[str, Sequence[Curve]],
    means: Mapping[str, Curve],
    frame: tuple[float | None, tuple[float, float]],
) -> Picture:
    teacher, within = frame

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, _short(name), "epoch")
        for other in means.values():
            axes.plot(other.at, other.values, color=theme.ink, alpha=0.25, linewidth=1)
        for seed in rows[name] if len(rows[name]) > 1 else ():
            axes.plot(seed.at, seed.values, color=theme.line(number), linewidth=0.7)
        own = means[name]
        axes.plot(own.at, own.values, "o-", color=theme.line(number), markersize=3.5)
        _teacher(axes, teacher, theme)
        _whole(axes, own)
        scale(axes, *within, log=False)

    last = means[name].values[-1] if means[name].values else float("nan")
    seeds = f"{len(rows[name])} seed{'s' if len(rows[name]) > 1 else ''}"
    alt = f"RSUM after each epoch of {name}, mean of {seeds}: {last:.2f} after the last."
    return picture(draw, alt, height=2.2)


def together(
    runs: Mapping[str, Mapping[str, Curve]], what: str, log: bool | None = None
) -> list[Picture]:
    """Draw all losses, or weights, of a run in one picture, a picture a run, on one y axis.

    Args:
        runs: row of the table → name of the loss → curve.
        what: "losses" or "weights".
        log: whether the axis is a log one; None lets the values say.
    """
    names = curve_names(runs.values())
    short = {row: {n: bins(c, 60) for n, c in curves.items()} for row, curves in runs.items()}
    means = [b.mean for curves in short.values() for b in curves.values()]
    low, high = min(float(m.min()) for m in means), max(float(m.max()) for m in means)
    if log is None:
        log = low > 0 and high > WIDE * low
    place = partial(scale, low=low, high=high, log=log)
    return [_run(row, what, short[row], names, place) for row in runs]


def _run(
    row: str, what: str, curves: Mapping[str, Bins], names: list[str], place: Callable[..., None]
) -> Picture:
    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, f"{what}: {_short(row)}", "step")
        for name, bins in curves.items():
            number = names.index(name)
            axes.plot(
                bins.at,
                bins.mean,
                color=theme.line(number),
                linestyle=theme.dash(number),
                label=name,
            )
        place(axes)
        _legend(figure)

    ends = "; ".join(f"{n} from {b.mean[0]:.3g} to {b.mean[-1]:.3g}" for n, b in curves.items())
    return picture(draw, f"The {what} of {row} over the steps of one seed: {ends}.", height=3.0)


def _short(name: str, most: int = 46) -> str:
    """Cut a title so that it fits; the table has the whole name."""
    return name if len(name) <= most else name[: most - 1] + "…"


def bars(rows: Sequence[tuple[str, float, float | None]], teacher: float | None) -> Picture:
    """Draw the RSUM of a table's rows: name, mean, standard deviation; each name above its bar."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        for y, (name, rsum, std) in enumerate(rows):
            axes.barh(y, rsum, 0.36, xerr=std, color=theme.line(0), ecolor=theme.ink, capsize=3)
            spread = "" if std is None else f" ± {std:.2f}"
            label = f"{_short(name, 38)}   {rsum:.2f}{spread}"
            # on paper of its own, or lines would cross it
            paper = {"facecolor": theme.page, "edgecolor": "none", "pad": 1}
            axes.text(0, y - 0.27, label, va="bottom", bbox=paper)
        if teacher is not None:
            axes.axvline(teacher, color=theme.ink, linestyle="--", linewidth=1.2, label="teacher")
            _legend(figure)
        axes.set_ylim(len(rows) - 0.6, -0.85)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("RSUM")

    spoken = "; ".join(
        f"{n} {r:.2f}" + (f" ± {s:.2f}" if s is not None else "") for n, r, s in rows
    )
    beside = "" if teacher is None else f" The teacher's is {teacher:.2f}."
    return picture(draw, f"RSUM of each row: {spoken}.{beside}", height=0.9 + 0.46 * len(rows))
