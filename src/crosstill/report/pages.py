"""The pages of reports: of one run, and of a grid with the runs behind its tables.

A page is made of plain blocks. Every text in it is escaped: captions come from anywhere.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, ClassVar

import jinja2

from crosstill import ablate, files, formats
from crosstill.ablate import efficiency
from crosstill.ablate.tables import Row, Table, latex, legend, markdown
from crosstill.errors import InputError
from crosstill.evaluate import Evaluation, table
from crosstill.evaluate.evaluation import LATENCY
from crosstill.evaluate.likeness import NAMES
from crosstill.files import VERSION
from crosstill.report import curves, pictures, run_results
from crosstill.report.pictures import Picture
from crosstill.train import folder as runs
from crosstill.types import Features

ORDER = ("teacher", "student", "untrained")
FEW = 8  # rows up to which the losses and weights of each are shown


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Command:
    """The command that the user typed."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Sheet:
    """A table; numeric ones have their numbers at the right."""

    kind: ClassVar[str] = "table"
    heads: Sequence[str]
    body: Sequence[Sequence[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, as many as there is room for."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Queries:
    """Captions and the photos that the models find for them."""

    kind: ClassVar[str] = "queries"
    queries: Sequence[run_results.Query]


Block = Text | Command | Sheet | Pictures | Queries


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def html(title: str, summary: str, sections: Sequence[Section]) -> str:
    """Render the whole page."""
    source = resources("crosstill.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(title=title, summary=summary, sections=sections)


def save(folder: Path, page: str, texts: Mapping[str, str], figures: tuple[str, Any]) -> Path:
    """Write the page and what goes beside it; return where the page is.

    Args:
        folder: made if it is not there.
        page: the HTML.
        texts: file name → contents.
        figures: a file's name and its JSON.
    """
    files.writable_folder(folder)
    for name, text in {**texts, "report.html": page}.items():
        # a file name on disk need not be valid UTF-8
        files.write_bytes(folder / name, text.encode("utf-8", "replace"))
    files.write_json(folder / figures[0], figures[1])
    return folder / "report.html"


def settings(values: Mapping[str, Any]) -> Sheet:
    """List settings, one a line, with the dotted names that --set takes."""
    return Sheet(("setting", "value"), list(_flat(values, "")), numeric=False)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _written(value)


def _written(value: object) -> str:
    if value is None:
        return "none"
    if value == {}:
        return "defaults"
    return value if isinstance(value, str) else json.dumps(value)


def is_run(folder: Path) -> bool:
    """Tell a run's folder from a model's with a config.json of its own."""
    return runs.is_run(folder) and (folder / "student").is_dir()


def write_run(folder: Path, out: Path, latency: bool) -> Path:
    """Write the report of a run: see `crosstill.report.write`."""
    results = run_results.read(folder, latency)
    wide = _as_wide(results.space) if results.space else {}
    both = wide and all(len(side) for rows in wide.values() for side in rows)
    shown = pictures.fit_space(wide) if both else None
    # first, since it may refuse
    searchable = results.features and all(map(len, results.features["student"]))
    finds = [_finds(results)] if searchable else []
    sections = [
        _recall(results),
        *_curves(results),
        *([_space(results, shown)] if shown else []),
        *finds,
        _settings(results),
    ]
    losses = " + ".join(results.record["settings"]["losses"])
    title = f"{folder.resolve().name}: {losses}"
    heads, body = _cells(results)
    texts = {
        "table.md": "\n\n".join([table(_rows(results)), results.summary, *results.notes]) + "\n",
        "table.tex": formats.latex(results.summary, heads, body),
    }
    page = html(title, results.summary, sections)
    return save(out, page, texts, ("report.json", _figures(results, shown)))


def _rows(results: run_results.RunResults) -> list[Evaluation]:
    return [results.rows[role] for role in ORDER if role in results.rows]


def _cells(results: run_results.RunResults) -> tuple[list[str], list[list[str]]]:
    rows = _rows(results)
    timed = any(row.efficiency for row in rows)
    return [*rows[0].heads, *(LATENCY if timed else ())], [row.cells(timed) for row in rows]


def _recall(results: run_results.RunResults) -> Section:
    heads, body = _cells(results)
    images, captions = len(results.split.images), len(results.split.captions)
    where = (
        f"on {images:,} images and {captions:,} captions of the split {results.split.name!r}, on "
        "which the best epoch was chosen"
    )
    legend = f"Recall in percent {where}; RSUM is the sum of the six."
    if not results.split.pairs:
        legend = (
            f"Agreement with the teacher in percent {where}: no photo there has captions. Overlap: "
            "how many of the teacher's ten best the student has among its ten. Own rows: how often "
            "the student's row finds the teacher's of the same photo or text."
        )
    if "teacher" in results.rows:
        legend += " The teacher's row is from the cache."
    if heads[-1] in LATENCY:
        legend += (
            " Milliseconds are medians of single items on one thread of this machine, "
            "measured in turn."
        )
    notes = [Text(note) for note in [*_likeness(results.cosines), *results.notes]]
    title = "Recall" if results.split.pairs else "Agreement with the teacher"
    return Section(title, [Sheet(heads, body), Text(legend), *notes])


def _likeness(cosines: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say how alike the rows of the models are, in a sentence; nothing of models without rows."""
    parts = [
        f"{side}: " + ", ".join(f"{role} {cosines[role][name]:.2f}" for role in roles)
        for name, side in NAMES.items()
        if (roles := [role for role in ORDER if name in cosines.get(role, {})])
    ]
    listed = "; ".join(parts)
    return [f"Mean cosine between different ones, {listed}. Near 1 all are alike."] if parts else []


def _curves(results: run_results.RunResults) -> list[Section]:
    log, teacher = results.log, results.rows.get("teacher")
    line = teacher.recall.value if teacher else None
    every = results.record["settings"]["log_every"]
    sections = []
    if log.rsum.at:
        figure = results.rows["student"].recall.name
        shown = [curves.of_val(log.rsum, line, f"{figure} on {results.split.name}")]
        shown += curves.of_cosines(
            log.cosines, results.cosines.get("teacher", {}), results.split.name
        )
        sections.append(Section("Learning curve", [Pictures(shown)]))
    if not log.losses:
        return [*sections, Section("Losses", [Text(f"No step was logged (log_every = {every}).")])]
    logged = f"One step in {every}" if every > 1 else "Every step"
    legend = (
        f"{logged} was logged. Long curves are drawn in at most 120 points: the line is the mean, "
        "the band goes from the lowest to the highest value. Positive losses: log axis."
    )
    losses = Pictures(curves.over_steps(log.losses, "loss"), legend)
    balance = results.record["settings"]["balance"]["name"]
    caption = f"What the balancer {balance!r} multiplies each loss with, at the same steps."
    weights = Pictures(curves.over_steps(log.weights, "weight"), caption)
    return [*sections, Section("Losses", [losses]), Section("Weights", [weights])]


def _as_wide(features: dict[str, Features]) -> dict[str, Features]:
    """Return the features in the student's own space; a joined teacher may be wider."""
    width = features["student"].image.shape[1]
    return {name: rows for name, rows in features.items() if rows.image.shape[1] == width}


def _space(results: run_results.RunResults, shown: pictures.Space) -> Section:
    images, captions = (len(next(iter(side.values()))) for side in (shown.images, shown.captions))
    fitted = "teacher and student together" if len(shown.images) > 1 else "the student"
    legend = (
        f"{images:,} images and {captions:,} captions of {results.split.name!r}, chosen by a fixed "
        f"seed, on the first three axes of one principal component analysis of {fitted}: axes, "
        "limits and point of view are the same in all pictures."
    )
    return Section("Feature space", [Pictures(pictures.draw_spaces(shown), legend)])


def _finds(results: run_results.RunResults) -> Section:
    queries = run_results.queries(results.cache, results.split, results.features)
    pairs = results.split.pairs
    legend = (
        f"The first {run_results.TOP} of {len(results.split.images):,} photos for {len(queries)} "
        f"{'captions' if pairs else 'texts'} spread evenly over the split. "
    ) + (
        "The one right photo is framed and bears a check mark."
        if pairs
        else "No text belongs to a photo, so none is right."
    )
    return Section("What they find", [Text(legend), Queries(queries)])


def _settings(results: run_results.RunResults) -> Section:
    record, teacher = results.record, results.cache.teacher
    source = results.cache.header["data"]
    facts = {
        "run": results.run.folder.resolve(),
        "cache": record["cache"]["folder"],
        "cache digest": record["cache"]["digest"],
        "data": source["name"],
        "photos": source["source"].get("root", source["source"]["form"]),
        "teacher": teacher["name"] or "none",
        "licence of the teacher": teacher["licence"] or "not said by its model card",
        **{
            f"licence of the {part}": licence or "not said by its model card"
            for part, licence in results.licences.items()
        },
        "licence of the photos": "that of their source; keep to it",
        **{f"version of {name}": version for name, version in record["versions"].items()},
        "version of crosstill that wrote this page": VERSION,
    }
    body = [(name, str(value)) for name, value in facts.items()]
    typed = (
        [Command(record["command"])]
        if record["command"]
        else [Text("Made from Python, no command.")]
    )
    return Section(
        "How it was made",
        [*typed, Sheet(("", ""), body, numeric=False), settings(record["settings"])],
    )


def _figures(results: run_results.RunResults, shown: pictures.Space | None) -> dict[str, Any]:
    return {
        "summary": results.summary,
        "split": results.split.name,
        **{role: row.to_json() for role, row in results.rows.items()},
        "mean_cosine": results.cosines,
        "variance_shown": shown.explained if shown else {},
        "notes": results.notes,
    }


def write_grid(folder: Path, out: Path) -> Path:
    """Write the report of a grid: see `crosstill.report.write`."""
    title = f"Grid: {folder.resolve().name}"
    return write_tables(ablate.read(folder), title, out, efficiency.read(folder))


def write_tables(
    tables: Sequence[Table], title: str, out: Path, costs: efficiency.Costs | None = None
) -> Path:
    """Write the report of tables that are already there, the costs of table 3 last."""
    sections = [_table_section(table) for table in tables]
    made = [costs] if costs else []
    for cost in made:
        blocks: list[Block] = [Sheet(*cost.cells()), Text(cost.legend), Command(cost.command)]
        sections.append(Section(efficiency.TITLE, blocks))
    runs = len({run for table in tables for row in table.rows for run in row.runs})
    plural = "s" if len(sections) > 1 else ""
    summary = f"{len(sections)} table{plural} from {runs} runs, written by crosstill {VERSION}."
    texts = {
        "table.md": "\n".join([*map(markdown, tables), *(cost.markdown() for cost in made)]),
        "table.tex": "\n".join([*map(latex, tables), *(cost.latex() for cost in made)]),
    }
    figures: dict[str, Any] = {"tables": [table.to_json() for table in tables]}
    if costs:
        figures["costs"] = costs.to_json()
    page = html(title, summary, sections)
    return save(out, page, texts, ("metrics.json", figures))


def _table_section(table: Table) -> Section:
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
        *(_losses_and_weights(logs, table.seeds[0]) if len(table.rows) <= FEW else ()),
        Command(table.command),
        settings(table.settings),
    ]
    return Section(table.title, blocks)


def _epochs(rsum: dict[str, list[curves.Curve]], teacher: float | None) -> list[Block]:
    """Show RSUM epoch by epoch, if there is more than one."""
    if not any(len(curve.at) > 1 for seeds in rsum.values() for curve in seeds):
        return []
    caption = (
        "RSUM on the validation split after every epoch: the row's mean over seeds with dots, "
        "its seeds thin, the other rows' means grey."
    )
    return [Pictures(curves.of_rows(rsum, teacher), caption)]


def _log(row: Row, run: Path) -> curves.Events:
    if not run.is_dir():
        raise InputError(
            f"{run}: the run of {row.name!r} is gone; `crosstill ablate` makes it again"
        )
    return curves.read(run)


def _losses_and_weights(logs: dict[str, list[curves.Events]], seed: int) -> list[Block]:
    """Show losses and weights of the first seed of every row that logged any, on shared axes."""
    first = {name: seeds[0] for name, seeds in logs.items() if seeds and seeds[0].losses}
    if not first:
        return []
    shared = f"Seed {seed}, means of at most 60 groups of logged steps; one axis for all rows."
    losses = curves.together({name: log.losses for name, log in first.items()}, "losses")
    weights = curves.together({name: log.weights for name, log in first.items()}, "weights")
    return [Pictures(losses, f"Losses. {shared}"), Pictures(weights, f"Weights. {shared}")]
