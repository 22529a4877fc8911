"""The report of a grid: every finished table, and the runs behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosstill import __version__
from crosstill.ablate.results import Row, Table, latex, legend, markdown
from crosstill.errors import InputError
from crosstill.report import curves, events, page
from crosstill.report.events import Curve, Events
from crosstill.report.page import Block, Command, Pictures, Section, Sheet, Text

FEW = 8  # rows up to which the losses and weights of each are shown


def write(folder: Path, out: Path) -> Path:
    """See `crosstill.report.write`."""
    from crosstill import ablate

    return save(ablate.read(folder), f"Grid: {folder.resolve().name}", out)


def save(tables: Sequence[Table], title: str, out: Path) -> Path:
    """Write the report of tables that are already there."""
    sections = [_section(table) for table in tables]
    runs = len({run for table in tables for row in table.rows for run in row.runs})
    plural = "s" if len(tables) > 1 else ""
    summary = f"{len(tables)} table{plural} from {runs} runs, written by crosstill {__version__}."
    texts = {
        "table.md": "\n".join(map(markdown, tables)),
        "table.tex": "\n".join(map(latex, tables)),
    }
    figures = {"tables": [table.to_json() for table in tables]}
    return page.save(out, page.html(title, summary, sections), texts, ("metrics.json", figures))


def _section(table: Table) -> Section:
    heads, body = table.cells()
    teacher = table.teacher.rsum if table.teacher else None
    logs = {row.name: [_log(row, run) for run in row.runs] for row in table.rows}
    bars = [(row.name, row.rsum.mean, row.rsum.std) for row in table.rows]
    rsum = {name: [log.rsum for log in seeds] for name, seeds in logs.items()}
    beyond = f"The teacher, {table.teacher_name}, is the dashed line." if teacher else ""
    blocks: list[Block] = [
        Sheet(heads, body),
        Text(legend(table)),
        Pictures([curves.bars(bars, teacher)], f"RSUM on {table.split!r}. {beyond}"),
        *_epochs(rsum, teacher),
        *(_inside(logs, table.seeds[0]) if len(table.rows) <= FEW else ()),
        Command(table.command),
        page.settings(table.settings),
    ]
    return Section(table.title, blocks)


def _epochs(rsum: dict[str, list[Curve]], teacher: float | None) -> list[Block]:
    """RSUM epoch by epoch, if there is more than one."""
    if not any(len(curve.at) > 1 for seeds in rsum.values() for curve in seeds):
        return []
    said = (
        "RSUM on the validation split after every epoch: the row's mean over seeds with dots, "
        "its seeds thin, the other rows' means grey."
    )
    return [Pictures(curves.of_rows(rsum, teacher), said)]


def _log(row: Row, run: Path) -> Events:
    if not run.is_dir():
        raise InputError(
            f"{run}: the run of {row.name!r} is gone; `crosstill ablate` makes it again"
        )
    return events.read(run)


def _inside(logs: dict[str, list[Events]], seed: int) -> list[Block]:
    """Losses and weights of the first seed of every row that logged any, on shared axes."""
    first = {name: seeds[0] for name, seeds in logs.items() if seeds and seeds[0].losses}
    if not first:
        return []
    said = f"Seed {seed}, means of at most 60 groups of logged steps; one axis for all rows."
    losses = curves.together({name: log.losses for name, log in first.items()}, "losses")
    weights = curves.together({name: log.weights for name, log in first.items()}, "weights")
    return [Pictures(losses, f"Losses. {said}"), Pictures(weights, f"Weights. {said}")]
