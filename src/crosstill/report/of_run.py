"""The report of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosstill import __version__
from crosstill.evaluate import Evaluation, table, tabular
from crosstill.evaluate.report import HEADINGS, LATENCY
from crosstill.report import curves, gather, page, sheet, space
from crosstill.report.gather import Gathered
from crosstill.report.page import Command, Pictures, Queries, Section, Sheet, Text
from crosstill.train import folder as runs
from crosstill.types import Features

ORDER = ("teacher", "student", "untrained")


def is_run(folder: Path) -> bool:
    """Whether it is a run's folder, and not a model's with a config.json of its own."""
    return runs.is_run(folder) and (folder / "student").is_dir()


def write(folder: Path, out: Path, latency: bool) -> Path:
    """See `crosstill.report.write`."""
    found = gather.run(folder, latency)
    shown = space.fit(_as_wide(found.seen)) if found.seen else None
    finds = [_finds(found)] if found.seen else []  # first, since it may refuse
    sections = [
        _recall(found),
        *_curves(found),
        *([_space(found, shown)] if shown else []),
        *finds,
        _settings(found),
    ]
    losses = " + ".join(found.record["settings"]["losses"])
    title = f"{folder.resolve().name}: {losses}"
    heads, body = _cells(found)
    texts = {
        "table.md": "\n\n".join([table(_rows(found)), found.summary, *found.notes]) + "\n",
        "table.tex": tabular.latex(found.summary, heads, body),
    }
    made = page.html(title, found.summary, sections)
    return page.save(out, made, texts, ("report.json", _figures(found, shown)))


def _rows(found: Gathered) -> list[Evaluation]:
    return [found.rows[role] for role in ORDER if role in found.rows]


def _cells(found: Gathered) -> tuple[list[str], list[list[str]]]:
    rows = _rows(found)
    timed = any(row.efficiency for row in rows)
    return [*HEADINGS, *(LATENCY if timed else ())], [row.cells(timed) for row in rows]


def _recall(found: Gathered) -> Section:
    heads, body = _cells(found)
    images, captions = len(found.split.images), len(found.split.captions)
    legend = (
        f"Recall in percent on {images:,} images and {captions:,} captions of the split "
        f"{found.split.name!r}, on which the best epoch was chosen; RSUM is the sum of the six."
    )
    if "teacher" in found.rows:
        legend += " The teacher's row is from the cache."
    if len(heads) > len(HEADINGS):
        legend += (
            " Milliseconds are medians of single items on one thread of this machine, "
            "measured in turn."
        )
    notes = [Text(note) for note in found.notes]
    return Section("Recall", [Sheet(heads, body), Text(legend), *notes])


def _curves(found: Gathered) -> list[Section]:
    log, teacher = found.log, found.rows.get("teacher")
    line = teacher.recall.rsum if teacher else None
    every = found.record["settings"]["log_every"]
    sections = []
    if log.rsum.at:
        shown = [curves.of_val(log.rsum, line, found.split.name)]
        sections.append(Section("Learning curve", [Pictures(shown)]))
    if not log.losses:
        return [*sections, Section("Losses", [Text(f"No step was logged (log_every = {every}).")])]
    logged = f"One step in {every}" if every > 1 else "Every step"
    legend = (
        f"{logged} was logged. Long curves are drawn in at most 120 points: the line is the mean, "
        "the band goes from the lowest to the highest value. Positive losses: log axis."
    )
    losses = Pictures(curves.over_steps(log.losses, "loss"), legend)
    balance = found.record["settings"]["balance"]["name"]
    said = f"What the balancer {balance!r} multiplies each loss with, at the same steps."
    weights = Pictures(curves.over_steps(log.weights, "weight"), said)
    return [*sections, Section("Losses", [losses]), Section("Weights", [weights])]


def _as_wide(seen: dict[str, Features]) -> dict[str, Features]:
    """Those in the student's own space; a joined teacher may be wider."""
    width = seen["student"].image.shape[1]
    return {name: rows for name, rows in seen.items() if rows.image.shape[1] == width}


def _space(found: Gathered, shown: space.Space) -> Section:
    images, captions = (len(next(iter(side.values()))) for side in (shown.images, shown.captions))
    fitted = "teacher and student together" if len(shown.images) > 1 else "the student"
    legend = (
        f"{images:,} images and {captions:,} captions of {found.split.name!r}, chosen by a fixed "
        f"seed, on the first three axes of one principal component analysis of {fitted}: axes, "
        "limits and point of view are the same in all pictures."
    )
    return Section("Feature space", [Pictures(space.pictures(shown), legend)])


def _finds(found: Gathered) -> Section:
    asked = sheet.queries(found.cache, found.split, found.seen)
    legend = (
        f"The first {sheet.TOP} of {len(found.split.images):,} photos for {len(asked)} captions "
        "spread evenly over the split. The one right photo is framed and bears a check mark."
    )
    return Section("What they find", [Text(legend), Queries(asked)])


def _settings(found: Gathered) -> Section:
    record, teacher = found.record, found.cache.teacher
    source = found.cache.header["data"]
    facts = {
        "run": found.run.folder.resolve(),
        "cache": record["cache"]["folder"],
        "cache digest": record["cache"]["digest"],
        "data": source["name"],
        "photos": source["source"].get("root", source["source"]["form"]),
        "teacher": teacher["name"] or "none",
        "licence of the teacher": teacher["licence"] or "not said by its model card",
        **{
            f"licence of the {part}": licence or "not said by its model card"
            for part, licence in found.licences.items()
        },
        "licence of the photos": "that of their source; keep to it",
        **{f"version of {name}": version for name, version in record["versions"].items()},
        "version of crosstill that wrote this page": __version__,
    }
    body = [(name, str(value)) for name, value in facts.items()]
    typed = (
        [Command(record["command"])]
        if record["command"]
        else [Text("Made from Python, no command.")]
    )
    return Section(
        "How it was made",
        [*typed, Sheet(("", ""), body, numeric=False), page.settings(record["settings"])],
    )


def _figures(found: Gathered, shown: space.Space | None) -> dict[str, Any]:
    return {
        "summary": found.summary,
        "split": found.split.name,
        **{role: row.to_json() for role, row in found.rows.items()},
        "variance_shown": shown.explained if shown else {},
        "notes": found.notes,
    }
