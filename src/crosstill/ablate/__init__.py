"""Grids of runs: the tables of a paper on the user's own data, with seeds and spread.

A grid's folder:

    table4.json …   sealed plan of each table: rows, settings, seeds, the runs that fill it
    runs/KEY/       run folders; the key is a digest of all that decides the run, so tables share
    table4.md …     the finished tables
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstill import cache as caches
from crosstill import files
from crosstill.ablate import grid, plan
from crosstill.ablate.results import Cell, Row, Table, latex, markdown
from crosstill.ablate.tables import TABLES
from crosstill.cache import CacheBase
from crosstill.errors import InputError, RunError
from crosstill.evaluate import bootstrap, teacher_recall
from crosstill.evaluate.recall import Retrieval
from crosstill.fusion import validation
from crosstill.fusion.scores import ScoreCache

__all__ = ["TABLES", "Table", "fill", "is_grid", "latex", "markdown", "read", "run"]

log = logging.getLogger(__name__)


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
    found = _table(plan.load(folder / f"{made.table}.json"), folder)
    files.write_bytes(folder / f"{made.table}.md", markdown(found).encode())
    files.write_bytes(folder / f"{made.table}.tex", latex(found).encode())
    return found


def is_grid(folder: Path) -> bool:
    """Whether tables were planned there."""
    return any((folder / f"{name}.json").is_file() for name in TABLES)


def read(folder: Path) -> list[Table]:
    """The finished tables of a grid, in the order of the paper.

    Raises:
        InputError: there is none, or one is not finished.
    """
    plans = [folder / f"{name}.json" for name in TABLES if (folder / f"{name}.json").is_file()]
    if not plans:
        raise InputError(f"{folder}: no grid there; make one with `crosstill ablate`")
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
    found = {name: [grid.answers(path) for path in paths] for name, paths in runs.items()}
    reference = bootstrap.average(found[record["reference"]])
    rows = [
        Row(
            name=row["name"],
            recalls=_recalls(found[row["name"]]),
            rsum=Cell.of([one.rsum for one in found[row["name"]]]),
            difference=_difference(row["name"], record["reference"], found, reference),
            paper=row["paper"],
            runs=tuple(runs[row["name"]]),
            minutes=sum(_minutes(path) for path in runs[row["name"]]) / len(record["seeds"]),
        )
        for row in record["rows"]
    ]
    shared = {k: v for k, v in record["rows"][0]["settings"].items() if _common(record, k)}
    split = record["rows"][0]["settings"]["val_split"]
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
    )


def _difference(
    name: str,
    against: str,
    found: dict[str, list[bootstrap.Answers]],
    reference: bootstrap.Answers,
) -> bootstrap.Difference | None:
    if name == against:
        return None
    return bootstrap.paired(bootstrap.average(found[name]), reference)


def _recalls(seeds: Sequence[bootstrap.Answers]) -> tuple[Cell, ...]:
    rows = [[*one.image.mean(0).tolist(), *one.text.mean(0).tolist()] for one in seeds]
    return tuple(Cell.of([100 * value for value in column]) for column in zip(*rows, strict=True))


def _minutes(path: Path) -> float:
    return float(files.read_json(path / grid.DONE)["minutes"])


def _common(record: Mapping[str, Any], key: str) -> bool:
    return all(row["settings"][key] == record["rows"][0]["settings"][key] for row in record["rows"])


def _teacher(record: Mapping[str, Any], split: str) -> Retrieval | None:
    """The teacher's row, from the cache that the grid learnt from, if it is still there."""
    try:
        cache = caches.open(record["cache"]["folder"])
        if cache.digest != record["cache"]["digest"]:
            raise RunError("another cache is in its place")
        rows = cache.split(split)
        if record.get("listed") and isinstance(cache, ScoreCache):
            return validation.Listed(cache, rows).teacher_recall()
        return teacher_recall(cache, rows)
    except (InputError, RunError) as error:
        log.warning("no teacher's row: %s", error)
        return None
