"""From a table's rows to the runs that fill it."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crosstill import balance, files, objectives, recipes, students
from crosstill.ablate.tables import Design, Setting, design
from crosstill.cache import CacheBase
from crosstill.errors import ConfigError, MismatchError, unknown
from crosstill.evaluate.bootstrap import FEWEST
from crosstill.train import TrainConfig
from crosstill.train.config import parse
from crosstill.train.task import build_losses, fit_queues, named_losses, open_task

log = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One run of a grid: everything that decides its result.

    `key` names its folder, so that tables which share a setting share the run.
    """

    key: str
    row: str
    student: str
    settings: TrainConfig
    command: str


@dataclass(frozen=True)
class Plan:
    """A table that is to be run, as it is kept in `TABLE.json`."""

    record: dict[str, Any]

    @property
    def table(self) -> str:
        return str(self.record["table"])

    def jobs(self) -> Iterator[Job]:
        """All runs, seed by seed, so that a grid that is stopped early has whole columns."""
        for position, seed in enumerate(self.record["seeds"]):
            for row in self.record["rows"]:
                settings = parse({**row["settings"], "seed": seed})
                typed = f"{self.record['command']}  # row {row['name']!r}, seed {seed}"
                yield Job(row["runs"][position], row["name"], row["student"], settings, typed)

    def save(self, folder: Path) -> None:
        """Keep the plan in the grid's folder, in place of an earlier one of the same table.

        Nothing is lost: runs are named by what decides them, and those that fit are used again.
        """
        path = folder / f"{self.table}.json"
        if path.is_file():
            earlier = files.read_sealed(path, {FORMAT})
            different = [
                k for k in self.record if k != "command" and earlier.get(k) != self.record[k]
            ]
            if not different:
                return
            log.info("%s: planned anew, other %s", self.table, " and ".join(different))
        files.write_json(path, files.sealed(self.record))


def load(path: Path) -> Plan:
    """Read a plan."""
    return Plan(files.read_sealed(path, {FORMAT}))


def make(
    table: str,
    cache: CacheBase,
    chosen: Sequence[str],
    changes: Sequence[str],
    seeds: Sequence[int],
    command: str = "",
) -> Plan:
    """Work out every run of a table and refuse what cannot work.

    Args:
        table: a key of `tables.TABLES`.
        cache: what all rows learn from.
        chosen: the student of all rows, as a preset or TOML file; for `towers` one a row.
        changes: `key=value` texts for all rows; options of a loss reach the rows that have it.
        seeds: one run each.
        command: what the user typed.

    Raises:
        ConfigError, MismatchError, DataError: no such table, a setting that cannot work, a cache
            that does not teach what it compares, too few images for the queue or the bootstrap.
    """
    what = design(table)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds must be distinct and at least one, not {list(seeds)}")
    _check_varied(table, what, changes)
    _check_cache(table, what, cache)
    plain = recipes.config("dsmd", [c for c in changes if _loss_of(c) is None])
    _check_images(cache, plain.val_split)
    what = _runnable(what, cache, plain.train_split)
    configs = _fitted(cache, [_settings(one, what.shared, changes) for one in what.rows])
    _check_used(table, configs, changes)
    _check_lists(table, what, configs, cache)
    named = _students(table, what, chosen)
    listed = _are_fusion(named)
    filled = zip(what.rows, configs, named, strict=True)
    rows = [_row(*one, cache, seeds) for one in filled]
    if table == "towers" and chosen:
        rows = [{**row, "name": students.load_config(row["student"]).name} for row in rows]
    caveat = cache.caveat(cache.split(configs[0].val_split)) if listed else ""
    reference = rows[[row.name for row in what.rows].index(what.reference)]["name"]
    record = {
        "format": FORMAT,
        "table": table,
        "title": what.title,
        "note": f"{what.note} {caveat}".strip(),
        "listed": listed,
        "reference": reference,
        "seeds": list(seeds),
        "rows": rows,
        "changes": list(changes),
        "cache": {"folder": str(cache.folder.resolve()), "digest": cache.digest},
        "teacher": cache.teacher,
        "data": cache.header["data"],
        "command": command,
    }
    return Plan(json.loads(json.dumps(record)))


def _row(
    setting: Setting, config: TrainConfig, student: str, cache: CacheBase, seeds: Sequence[int]
) -> dict[str, Any]:
    """Make a row of the record, after everything that a run would refuse has been tried."""
    description = students.load_config(student)
    open_task(cache, config).check(description)
    identity = [description.model_dump(mode="json"), cache.digest]
    return {
        "name": setting.name,
        "paper": setting.paper,
        "student": student,
        "settings": config.model_dump(mode="json"),
        "runs": [_key(config.changed([f"seed={seed}"]), identity) for seed in seeds],
    }


def _settings(setting: Setting, shared: Sequence[str], changes: Sequence[str]) -> TrainConfig:
    """Make a row's settings; options of losses that it does not have do not count for it."""
    config = recipes.config(setting.recipe, (*shared, *setting.changes))
    for change in changes:  # in turn, because one may bring the loss that the next is of
        if _loss_of(change) is None or _loss_of(change) in config.losses:
            config = config.changed([change])
    return config


def _fitted(cache: CacheBase, configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Fit the queues of all rows to the cache, and say once which are shorter than usual."""
    rows = [fit_queues(cache, config) for config in configs]
    for line in dict.fromkeys(line for _, lines in rows for line in lines):
        log.info(line)
    return [config for config, _ in rows]


def _loss_of(change: str) -> str | None:
    """Return the loss whose option a change sets; None for a setting of the run."""
    head, *rest = change.partition("=")[0].strip().split(".")
    return rest[0] if head == "losses" and len(rest) > 1 else None


def _key(config: TrainConfig, identity: object) -> str:
    """Name a run: rows with the same settings share it, whatever their recipe is called."""
    values = config.model_dump(mode="json")
    del values["recipe"]
    # spelt out, so that a default that is set and one that is not are the same run
    values["losses"] = {k: objectives.spelt_out(k, chosen) for k, chosen in config.losses.items()}
    rule = values["balance"].get("name", "fixed")
    values["balance"] = balance.spelt_out(rule, {"name": rule, **values["balance"]})
    return files.digest_json([values, identity])[:12]


def _students(table: str, what: Design, chosen: Sequence[str]) -> list[str]:
    if table == "towers":
        if chosen and len(chosen) != len(what.rows):
            raise ConfigError(
                f"towers compares {len(what.rows)} students; give --student as often, or not at all"
            )
        return list(chosen) or [str(row.student) for row in what.rows]
    if len(chosen) > 1:
        raise ConfigError(f"{table} has one student in all rows; give --student once")
    return [chosen[0] if chosen else what.student] * len(what.rows)


def _check_varied(table: str, what: Design, changes: Sequence[str]) -> None:
    """Refuse to set for all rows what the rows differ in."""
    varied = {change.partition("=")[0] for row in what.rows for change in row.changes}
    for change in changes:
        key = change.partition("=")[0].strip()
        inside = [v for v in varied if key.startswith(f"{v}.") and v != "losses"]
        if key in varied or inside or any(v.startswith(f"{key}.") for v in varied):
            raise ConfigError(f"--set {change}: {table} varies that itself; leave it out")
        if key == "seed":
            raise ConfigError(f"--set {change}: a grid counts its seeds; give --seeds")


def _check_used(table: str, configs: Sequence[TrainConfig], changes: Sequence[str]) -> None:
    """Refuse an option of a loss that no row has."""
    for change in changes:
        name = _loss_of(change)
        if name is not None and not any(name in config.losses for config in configs):
            if name not in objectives.known():
                raise unknown("loss", name, objectives.known())
            raise ConfigError(f"--set {change}: no row of {table} has that loss; leave it out")


def _check_cache(table: str, what: Design, cache: CacheBase) -> None:
    """Refuse a cache of the other kind than the table's."""
    if what.lists and not cache.scored:
        has = "was made without a teacher" if cache.listed else "holds features"
        raise MismatchError(
            f"{cache.folder} {has}, and {table} compares ways to learn a fusion teacher's scores; "
            "make a score cache: crosstill cache TEACHER DATA --false 63"
        )
    if not cache.listed and cache.modalities != {"image", "text"}:
        raise MismatchError(
            f"{cache.folder} has not both image and text features of a teacher, which the tables "
            "compare; cache a teacher that gives both"
        )


def _check_lists(
    table: str, what: Design, configs: Sequence[TrainConfig], cache: CacheBase
) -> None:
    """Refuse rows that a score cache cannot teach, or whose difference a setting undoes."""
    if what.lists and configs[0].teacher is not None:
        raise ConfigError(
            f"teacher = {configs[0].teacher}: one that scores beside the student always keeps the "
            f"hardest, so the rows of {table} would not differ; leave it out"
        )
    if not cache.listed:
        return
    for config in configs:
        losses = named_losses(build_losses(cache, config))
        blind = [name for name, loss in losses.items() if loss.lists is None]
        if blind:
            raise MismatchError(
                f"{cache.folder} is a score cache, and rows of {table} learn from features "
                f"({', '.join(blind)}); use the table dcd, or a cache of a dual encoder's features"
            )


def _are_fusion(named: Sequence[str]) -> bool:
    """Return whether the students are fusion models; refuse a mixture, which has no common recall.

    Raises:
        ConfigError: some are, and some are dual encoders.
    """
    fusion = [students.load_config(name).kind == "matcher" for name in named]
    if any(fusion) and not all(fusion):
        raise ConfigError(
            f"student {named[fusion.index(True)]}: a fusion model is measured among listed "
            "candidates and a dual encoder in the whole split; give one kind for all rows"
        )
    return any(fusion)


def _runnable(what: Design, cache: CacheBase, split: str) -> Design:
    """Leave out the rows that a cache cannot teach; the note says which.

    Where the reference is among them, the last row that stays takes its place: of queues the
    longest.

    Raises:
        ConfigError: fewer than two rows stay.
    """
    captions = len(cache.split(split).captions)
    obstacles = {row.name: _obstacle(row, captions, cache) for row in what.rows}
    left = "; ".join(f"{name}, {why}" for name, why in obstacles.items() if why)
    rows = tuple(row for row in what.rows if not obstacles[row.name])
    if not left:
        return what
    if len(rows) < 2:
        raise ConfigError(
            f"{cache.folder}: too few captions for two rows of {what.title!r} ({left}); use a "
            "larger dataset"
        )
    reference = rows[-1].name if obstacles[what.reference] else what.reference
    return replace(
        what, rows=rows, reference=reference, note=f"{what.note} Left out: {left}.".strip()
    )


def _obstacle(row: Setting, captions: int, cache: CacheBase) -> str:
    """Explain why a cache cannot teach a row; "" where it can."""
    if row.queue > captions:
        return f"longer than the {captions:,} training captions"
    if row.raw and not cache.raw:
        return "takes the teacher's raw rows, which `crosstill cache --raw` keeps"
    return ""


def _check_images(cache: CacheBase, split: str) -> None:
    count = len(cache.split(split).captioned)
    if not count:
        raise ConfigError(
            f"{cache.folder}: split {split!r} has no photo with captions, and tables compare "
            "recall; use a cache with captions, or `crosstill train`, which then measures agreement"
        )
    if count < FEWEST:
        raise ConfigError(
            f"{cache.folder}: split {split!r} has {count} images, and the bootstrap that compares "
            f"rows needs {FEWEST}"
        )
