"""What a run logged on its way: its events.jsonl as curves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import artefacts
from crosstill.errors import CorruptError, InputError

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
    """Every curve of one run: losses and weights over steps, RSUM on val over epochs."""

    losses: dict[str, Curve]
    weights: dict[str, Curve]
    rsum: Curve


@dataclass(frozen=True)
class Bins:
    """A curve in few points: of each bin of steps its middle, its mean, its extremes."""

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read(folder: Path) -> Events:
    """The curves of the run in a folder.

    Raises:
        InputError: it has no events.jsonl.
        CorruptError: a line of it is no JSON, or not one that crosstill wrote.
    """
    path = artefacts.member(folder, "events.jsonl")
    if not path.is_file():
        raise InputError(f"{path}: the run's log is gone; restore it, or run it again")
    found = Events({}, {}, Curve())
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            _add(found, json.loads(line))
        except _DAMAGED:
            raise CorruptError(
                f"{path}, line {number}: not a line of a run's log; restore it from a copy"
            ) from None
    return found


def _add(found: Events, event: dict[str, Any]) -> None:
    if event["kind"] == "epoch":
        found.rsum.add(event["epoch"], event["val"]["rsum"])
        return
    for curves, values in ((found.losses, event["losses"]), (found.weights, event["weights"])):
        for name, value in values.items():
            curves.setdefault(name, Curve()).add(event["step"], value)


def bins(curve: Curve, most: int = 120) -> Bins:
    """At most so many points; of a shorter curve every point is its own bin."""
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
    """The mean curve of several seeds, over the epochs that all of them reached."""
    shared = sorted(set.intersection(*(set(curve.at) for curve in curves)))
    each = [dict(zip(curve.at, curve.values, strict=True)) for curve in curves]
    return Curve(shared, [sum(by[at] for by in each) / len(each) for at in shared])


def names(curves: Iterable[Mapping[str, Curve]]) -> list[str]:
    """All names among several runs' curves, in the order of their first appearance."""
    return list(dict.fromkeys(name for by_name in curves for name in by_name))
