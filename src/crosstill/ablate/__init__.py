"""Grids of runs: the tables of a paper on the user's own data, with seeds and spread.

A grid's folder:

    table4.json …   sealed plan of each table: rows, settings, seeds, the runs that fill it
    runs/KEY/       run folders; the key is a digest of all that decides the run, so tables share
    table4.md …     the finished tables
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crosstill import cache as caches
from crosstill import files
from crosstill.ablate import efficiency, grid, plan
from crosstill.ablate.tables import TABLES, Cell, Row, Table, latex, markdown
from crosstill.cache import CacheBase
from crosstill.errors import InputError, RunError
from crosstill.evaluate import bootstrap, teacher_recall
from crosstill.evaluate.recall import Retrieval
from crosstill.fusion.lists import ListedPairs
from crosstill.fusion.scores import ScoreCache

__all__ = ["TABLES", "Table", "fill", "is_grid", "latex", "markdown", "read", "run"]

log = logging.getLogger(__name__)

AnyCache = TypeVar("AnyCache", bound=CacheBase)


def run(
    table: str,
    cache: CacheBase,
    out: str | Path,
    *,
    student: str | Sequence[str] = (),
    changes: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    workers: int | None = None,
) -> Table:
    """Fill a table: train every row with every seed, and compare.

    A grid that was stopped goes on where it was; its table is the same as if it had not been.

    Args:
        table: a key of `TABLES`.
        cache: what every row learns from: features, or scores of candidate lists.
        out: the grid's folder; several tables may share one, and then share runs.
        student: a preset or TOML file, or none for the table's own; for `towers` one a row.
        changes: `key=value` texts for all rows, such as "epochs=2" or "freeze=image".
        seeds: one run a row each.
        workers: runs at a time; None is one a GPU, or one.

    Raises:
        ConfigError, MismatchError, DataError: see `plan.make`.
        LockedError, RunError: see `grid.run`.
    """
    chosen = [student] if isinstance(student, str) else list(student)
    return fill(plan.make(table, cache, chosen, changes, seeds), cache, Path(out), workers)


def fill(made: plan.Plan, cache: CacheBase, folder: Path, workers: int | None = None) -> Table:
    """Run what a plan asks for, and write its table into the grid's folder."""
    grid.run(made, cache, folder, workers)
    table = _table(plan.load(folder / f"{made.table}.json"), folder)
    files.write_bytes(folder / f"{made.table}.md", markdown(table).encode())
    files.write_bytes(folder / f"{made.table}.tex", latex(table).encode())
    return table


def is_grid(folder: Path) -> bool:
    """Tell whether tables were planned, or costs measured, in a folder."""
    return any((folder / f"{name}.json").is_file() for name in (*TABLES, efficiency.NAME))


def read(folder: Path) -> list[Table]:
    """Read the finished tables of a grid, in the order of the paper; `efficiency.read` has table 3.

    Raises:
        InputError: there is no grid, or a table is not finished.
    """
    if not is_grid(folder):
        raise InputError(f"{folder}: no grid there; make one with `crosstill ablate`")
    plans = [folder / f"{name}.json" for name in TABLES if (folder / f"{name}.json").is_file()]
    return [_table(plan.load(path), folder) for path in plans]


def _table(made: plan.Plan, folder: Path) -> Table:
    record = made.record
    keys = [key for row in record["rows"] for key in row["runs"]]
    left = sum(not grid.finished(folder, key) for key in keys)
    if left:
        raise InputError(
            f"{folder}: {left} of {len(keys)} runs of {made.table} are not finished; run "
            f"`{record['command'] or f'crosstill ablate {made.table}'}` again"
        )
    runs = {row["name"]: [folder / "runs" / key for key in row["runs"]] for row in record["rows"]}
    fared = {name: [grid.answers(path) for path in paths] for name, paths in runs.items()}
    reference = bootstrap.average(fared[record["reference"]])
    rows = [
        Row(
            name=row["name"],
            recalls=_recalls(fared[row["name"]]),
            rsum=Cell.of([one.rsum for one in fared[row["name"]]]),
            difference=bootstrap.paired(bootstrap.average(fared[row["name"]]), reference)
            if row["name"] != record["reference"]
            else None,
            paper=row["paper"],
            runs=tuple(runs[row["name"]]),
            minutes=sum(files.read_json(run / grid.DONE)["minutes"] for run in runs[row["name"]])
            / len(record["seeds"]),
            parameters=_parameters(runs[row["name"]][0]),
        )
        for row in record["rows"]
    ]
    first, *others = (row["settings"] for row in record["rows"])
    shared = {k: v for k, v in first.items() if all(other[k] == v for other in others)}
    split = first["val_split"]
    return Table(
        name=made.table,
        title=record["title"],
        note=record["note"],
        reference=record["reference"],
        rows=tuple(rows),
        teacher=_teacher(record, split),
        teacher_name=Path(str(record["teacher"]["name"])).name,
        split=split,
        seeds=tuple(record["seeds"]),
        settings=shared,
        command=record["command"],
        teacher_parameters=record["teacher"].get("parameters"),
    )


def _parameters(run: Path) -> int | None:
    """Read how many parameters a finished run's student has."""
    metrics = run / "metrics.json"
    return files.read_json(metrics)["parameters"]["total"] if metrics.is_file() else None


def _recalls(seeds: Sequence[bootstrap.Answers]) -> tuple[Cell, ...]:
    rows = [[*one.image.mean(0).tolist(), *one.text.mean(0).tolist()] for one in seeds]
    return tuple(Cell.of([100 * value for value in column]) for column in zip(*rows, strict=True))


def _teacher(record: Mapping[str, Any], split: str) -> Retrieval | None:
    """Measure the teacher's recall from the cache that the grid learnt from, if it is there."""
    try:
        if record.get("listed"):
            scores = _reopened(ScoreCache, record)
            return ListedPairs(scores, scores.split(split)).teacher_recall()
        cache = _reopened(caches.open, record)
        return teacher_recall(cache, cache.split(split))
    except (InputError, RunError) as error:
        log.warning("no teacher's row: %s", error)
        return None


def _reopened(opener: Callable[[str], AnyCache], record: Mapping[str, Any]) -> AnyCache:
    """Open the cache that the grid learnt from."""
    cache = opener(record["cache"]["folder"])
    if cache.digest != record["cache"]["digest"]:
        raise RunError("another cache is in its place")
    return cache
