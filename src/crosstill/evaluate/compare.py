"""A model beside those it should be compared with: its teacher, itself before training, others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from crosstill import students
from crosstill.cache import Cache, Split
from crosstill.data import Pairs
from crosstill.errors import ConfigError, CrosstillError, InputError
from crosstill.evaluate import efficiency as cost
from crosstill.evaluate import fusion, protocols, timing
from crosstill.evaluate.encode import Embedded, embed
from crosstill.evaluate.models import open_encoder, open_live
from crosstill.evaluate.reading import captions, readable
from crosstill.evaluate.recall import from_scores
from crosstill.evaluate.report import Evaluation, Row, Timed, judge, remarks, table
from crosstill.files import read_json
from crosstill.teachers.base import Teacher
from crosstill.teachers.matcher import Matcher

log = logging.getLogger(__name__)

MODEL, TEACHER, UNTRAINED, BESIDE = "model", "teacher", "untrained", "beside"


@dataclass
class Comparison:
    """Rows by their role: the model, perhaps its teacher and itself untrained, and others."""

    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Row:
        """The row of what was asked for."""
        return self.rows[MODEL]

    def to_json(self) -> dict[str, Any]:
        """The model's numbers at the top level, each other row under its role."""
        beside = [row.to_json() for role, row in self.rows.items() if role.startswith(BESIDE)]
        own = {r: row.to_json() for r, row in self.rows.items() if r in (TEACHER, UNTRAINED)}
        return {**self.model.to_json(), **own, **({BESIDE: beside} if beside else {})}

    def table(self) -> str:
        """Teacher, then the model, then the untrained student, then the others."""
        order = [TEACHER, MODEL, UNTRAINED, *(role for role in self.rows if BESIDE in role)]
        return table([self.rows[role] for role in order if role in self.rows])


def run(
    source: str,
    pairs: Pairs,
    protocol: str = "full",
    efficiency: bool = False,
    strict: bool = False,
    beside: Sequence[str] = (),
    sample: int | None = None,
) -> Comparison:
    """Evaluate a model; a run is shown beside its teacher's cached rows and its untrained self.

    Args:
        source: a run, a student, a dual encoder or a fusion model.
        pairs: the images and captions, usually one split of a dataset.
        protocol: see `protocols.run`; fusion models take "full" alone.
        efficiency: also measure what the models cost, on one thread.
        strict: raise at the first image that cannot be read.
        beside: other models to measure on the same images.
        sample: time fusion models on so many pairs, and leave their recall out.

    Raises:
        InputError: a model or image that cannot be read, an unknown protocol, a sample without
            a fusion model to time.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample}: fusion models are timed on at least 1 pair")
    if sample is not None and not efficiency:
        raise ConfigError(f"--sample {sample}: the pairs that are timed; add --efficiency")
    sources = {MODEL: source, **{f"{BESIDE} {i}": other for i, other in enumerate(beside)}}
    models = {role: open_live(place) for role, place in sources.items()}
    _check(models, protocol, sample)
    found, names = Comparison(), {role: _label(place) for role, place in sources.items()}
    model = models[MODEL]
    if len(models) == 1 and not isinstance(model, Matcher):
        rows = embed(model, pairs, strict)
        pairs = _kept(pairs, rows)
        found.rows[MODEL] = judge(model, rows, protocol).renamed(names[MODEL])
    else:
        pairs = readable(pairs, [model.preprocess for model in models.values()], strict)
        for role, model in models.items():
            found.rows[role] = _row(model, names[role], pairs, (protocol, efficiency, sample))
    _remark(found, pairs)
    if (Path(source) / "config.json").is_file() and (Path(source) / "student").is_dir():
        _add_run(found, Path(source), models[MODEL], pairs, protocol)
    if efficiency:
        _add_costs(found, source, models, pairs, sample)
    return found


def _check(models: dict[str, Any], protocol: str, sample: int | None) -> None:
    """Refuse before anything is computed."""
    fused = any(isinstance(model, Matcher) for model in models.values())
    protocols.check(protocol)
    if fused and protocol != "full":
        raise ConfigError(
            f"protocol {protocol!r} is for embeddings; with a fusion model use 'full' on a "
            "dataset of that size"
        )
    if sample is not None and not fused:
        raise ConfigError("--sample: times fusion models, and none is here; leave it out")


def _label(source: str) -> str:
    return f"student ({Path(source).name})" if Path(source, "best").is_dir() else source


def _kept(pairs: Pairs, rows: Embedded) -> Pairs:
    """The examples that a model could read."""
    ids = set(rows.image_ids)
    kept = tuple(example for example in pairs.examples if example.image_id in ids)
    return replace(pairs, examples=kept, quarantine=rows.quarantine)


def _row(
    model: Teacher | Matcher, name: str, pairs: Pairs, asked: tuple[str, bool, int | None]
) -> Row:
    """A model's recall; a fusion model that is only timed on a sample has none."""
    protocol, efficiency, sample = asked
    if not isinstance(model, Matcher):
        return judge(model, embed(model, pairs), protocol).renamed(name)
    if sample is not None:
        return Timed(name, model.parameter_count())
    images, texts = len(pairs), len(captions(pairs.examples)[0])
    log.info(
        "%s: %d images x %d captions are %s passes", name, images, texts, f"{images * texts:,}"
    )
    with cost.one_thread() if efficiency else nullcontext():
        scored = fusion.score(model, pairs)
    spent = cost.Cost(scored.passes, scored.towers + scored.matching) if efficiency else None
    recall = from_scores(scored.scores, scored.owner)
    return Evaluation(name, recall, model.parameter_count(), cost=spent)


def _remark(found: Comparison, pairs: Pairs) -> None:
    """What a person should know of the rows."""
    found.notes += remarks(pairs.quarantine, len(pairs))
    for role, row in found.rows.items():
        if isinstance(row, Evaluation) and row.recall.warning:
            name = "" if role == MODEL else f"{row.name}: "
            found.notes.append(f"{name}{row.recall.warning}")


def _add_run(
    found: Comparison, folder: Path, model: Teacher | Matcher, pairs: Pairs, protocol: str
) -> None:
    """The rows of a run that need no more than the run itself."""
    teacher = read_json(folder / "config.json")["teacher"]
    if isinstance(model, Matcher):
        found.notes.append(
            "no row of the untrained student: it would be another full matrix; for it give "
            f"--beside {folder / 'student'}"
        )
    else:
        untrained = students.load(folder / "student")
        before = judge(untrained, embed(untrained, pairs), protocol)
        found.rows[UNTRAINED] = before.renamed("student, untrained")
    if teacher.get("kind") == "fusion":
        found.notes.append(
            "no teacher's row: a fusion teacher leaves scores, not features; for it give "
            f"--beside {teacher.get('source') or teacher['name']}"
        )
    elif teacher.get("modalities"):  # a run without a teacher has none
        try:
            found.rows[TEACHER] = _teacher(folder, pairs, protocol)
        except CrosstillError as error:
            found.notes.append(f"no teacher's row: {error}")


def _teacher(folder: Path, pairs: Pairs, protocol: str) -> Evaluation:
    """The teacher's recall on the same images, from the cache that the run learnt from."""
    cache = Cache(read_json(folder / "config.json")["cache"]["folder"])
    split = next((s for s in map(cache.split, set(cache.splits)) if _same(cache, s, pairs)), None)
    if split is None:
        raise InputError(f"{cache.folder} does not hold exactly these images and captions")
    # the cache orders images by id; a protocol with folds needs the dataset's order
    place = {example.image_id: position for position, example in enumerate(pairs.examples)}
    position = torch.tensor([place[cache.image_ids[row]] for row in split.images])
    image = cache.image_features(split.images[position.argsort().numpy()])
    owner = position[torch.from_numpy(split.owner)]
    recall = protocols.run(protocol, image, cache.text_features(split.captions), owner)
    name = Path(str(cache.teacher["name"])).name
    return Evaluation(f"teacher ({name})", recall, cache.teacher["parameters"])


def _same(cache: Cache, split: Split, pairs: Pairs) -> bool:
    ids = {cache.image_ids[row] for row in split.images}
    texts = sum(len(example.captions) for example in pairs.examples)
    return ids == {example.image_id for example in pairs.examples} and len(split.captions) == texts


def _add_costs(
    found: Comparison,
    source: str,
    models: dict[str, Teacher | Matcher],
    pairs: Pairs,
    sample: int | None,
) -> None:
    """Seconds for the whole set and, of what embeds, latency; the models take turns."""
    if TEACHER in found.rows:
        teacher = read_json(Path(source) / "config.json")["teacher"]
        try:
            models = {**models, TEACHER: open_encoder(teacher["source"] or teacher["name"])}
        except CrosstillError as error:
            found.notes.append(f"the teacher's latency was not measured: {error}")
    single = {role: model for role, model in models.items() if not isinstance(model, Matcher)}
    latency = cost.measure(single)
    # a fusion model that was run for its recall was timed then
    untimed = models if sample is not None else single
    spent = {role: row.cost for role, row in found.rows.items() if row.cost}
    spent |= timing.whole_set(untimed, pairs, sample or 0) if untimed else {}
    for role, value in cost.compared(spent).items():
        row = found.rows[role]
        found.rows[role] = replace(row, cost=value, efficiency=latency.get(role))
        if value.estimated:
            found.notes.append(
                f"≈ {row.name}: seconds extrapolated from {value.sample:,} timed pairs of "
                f"{value.passes:,}"
            )
