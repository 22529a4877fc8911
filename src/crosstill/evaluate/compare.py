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
from crosstill.evaluate import extended, fusion, protocols, timing
from crosstill.evaluate.encode import Embedded, embed
from crosstill.evaluate.extended import Placed
from crosstill.evaluate.models import cuts, open_encoder, open_live
from crosstill.evaluate.reading import captions, readable
from crosstill.evaluate.recall import from_scores
from crosstill.evaluate.report import Evaluation, Row, Timed, judge, remarks, table
from crosstill.evaluate.runs import CONFIG, read_record
from crosstill.evaluate.truth import of_texts
from crosstill.teachers.base import Teacher, truncation_note
from crosstill.teachers.matcher import Matcher

log = logging.getLogger(__name__)

MODEL, TEACHER, UNTRAINED, BESIDE = "model", "teacher", "untrained", "beside"


@dataclass(frozen=True)
class Options:
    """What to measure, and how.

    Attributes:
        protocol: see `protocols.run`; fusion models take those of a whole split.
        efficiency: also measure what the models cost, on one thread.
        strict: raise at the first image that cannot be read.
        beside: other models to measure on the same images.
        sample: time fusion models on so many pairs, and leave their recall out.
        truths: files of extended ground truth, see `crosstill.evaluate.extended`.
        annotations: the JSON in which captions have COCO's ids.
    """

    protocol: str = "full"
    efficiency: bool = False
    strict: bool = False
    beside: Sequence[str] = ()
    sample: int | None = None
    truths: Sequence[Path] = ()
    annotations: Path | None = None


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
        rows = [self.rows[role] for role in order if role in self.rows]
        told = {row.name: row.extended for row in rows if isinstance(row, Evaluation)}
        return table(rows) + (f"\n\n{extended.table(told)}" if any(told.values()) else "")


def run(
    source: str,
    pairs: Pairs,
    options: Options = Options(),
) -> Comparison:
    """Evaluate a model; a run is shown beside its teacher's cached rows and its untrained self.

    Args:
        source: a run, a student, a dual encoder or a fusion model.
        pairs: the images and captions, usually one split of a dataset.
        options: what to measure.

    Raises:
        InputError: a model, image or truth that cannot be read, an unknown protocol, a sample
            without a fusion model to time.
    """
    _check_sample(options)
    find = extended.opened(options.truths, options.annotations)
    find(pairs.examples)  # refuses what is of another dataset before anything is computed
    others = [*options.beside, *cuts(source)]
    sources = {MODEL: source, **{f"{BESIDE} {i}": other for i, other in enumerate(others)}}
    models = {role: open_live(place) for role, place in sources.items()}
    _check(models, options)
    found, names = Comparison(), {role: _label(place) for role, place in sources.items()}
    model = models[MODEL]
    if len(models) == 1 and not isinstance(model, Matcher):
        rows = embed(model, pairs, options.strict)
        pairs = _kept(pairs, rows)
        placed = find(pairs.examples)
        found.rows[MODEL] = judge(model, rows, options.protocol, placed).renamed(names[MODEL])
    else:
        pairs = readable(pairs, [model.preprocess for model in models.values()], options.strict)
        placed = find(pairs.examples)
        for role, model in models.items():
            found.rows[role] = _row(model, names[role], pairs, options, placed)
    _remark(found, pairs, placed)
    readers = {names[role]: model for role, model in models.items()}
    found.notes += [note] if (note := truncation_note(readers, captions(pairs.examples)[0])) else []
    if (Path(source) / CONFIG).is_file() and (Path(source) / "student").is_dir():
        _add_run(found, Path(source), models[MODEL], pairs, options.protocol, placed)
    if options.efficiency:
        _add_costs(found, source, models, pairs, options.sample)
    return found


def _check_sample(options: Options) -> None:
    sample = options.sample
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample}: fusion models are timed on at least 1 pair")
    if sample is not None and not options.efficiency:
        raise ConfigError(f"--sample {sample}: the pairs that are timed; add --efficiency")


def _check(models: dict[str, Any], options: Options) -> None:
    """Refuse before anything is computed."""
    fused = any(isinstance(model, Matcher) for model in models.values())
    protocols.check(options.protocol)
    if fused and options.protocol not in protocols.WHOLE:
        raise ConfigError(
            f"protocol {options.protocol!r} is for embeddings; with a fusion model use 'full' on "
            "a dataset of that size"
        )
    if options.sample is not None and not fused:
        raise ConfigError("--sample: times fusion models, and none is here; leave it out")


def _label(source: str) -> str:
    return f"student ({Path(source).name})" if Path(source, "best").is_dir() else source


def _kept(pairs: Pairs, rows: Embedded) -> Pairs:
    """The examples that a model could read."""
    ids = set(rows.image_ids)
    kept = tuple(example for example in pairs.examples if example.image_id in ids)
    return replace(pairs, examples=kept, quarantine=rows.quarantine)


def _row(
    model: Teacher | Matcher, name: str, pairs: Pairs, options: Options, placed: Sequence[Placed]
) -> Row:
    """A model's recall; a fusion model that is only timed on a sample has none."""
    if not isinstance(model, Matcher):
        return judge(model, embed(model, pairs), options.protocol, placed).renamed(name)
    if options.sample is not None:
        return Timed(name, model.parameter_count())
    images, texts = len(pairs), len(captions(pairs.examples)[0])
    log.info(
        "%s: %d images x %d captions are %s passes", name, images, texts, f"{images * texts:,}"
    )
    with cost.one_thread() if options.efficiency else nullcontext():
        scored = fusion.score(model, pairs)
    seconds = scored.towers + scored.matching
    return Evaluation(
        name,
        from_scores(scored.scores, protocols.counted(options.protocol, scored.truth)),
        model.parameter_count(),
        cost=cost.Cost(scored.passes, seconds) if options.efficiency else None,
        extended=tuple(truth.of_scores(scored.scores) for truth in placed),
    )


def _remark(found: Comparison, pairs: Pairs, placed: Sequence[Placed]) -> None:
    """What a person should know of the rows."""
    row = found.model
    shared = row.recall.shared if isinstance(row, Evaluation) else 0
    found.notes += remarks(pairs.quarantine, len(pairs), shared)
    found.notes += [note for truth in placed for note in truth.notes]
    for role, row in found.rows.items():
        if isinstance(row, Evaluation) and row.recall.warning:
            name = "" if role == MODEL else f"{row.name}: "
            found.notes.append(f"{name}{row.recall.warning}")


def _add_run(
    found: Comparison,
    folder: Path,
    model: Teacher | Matcher,
    pairs: Pairs,
    protocol: str,
    placed: Sequence[Placed],
) -> None:
    """The rows of a run that need no more than the run itself."""
    record = read_record(folder)
    teacher = record["teacher"]
    if isinstance(model, Matcher):
        found.notes.append(
            "no row of the untrained student: it would be another full matrix; for it give "
            f"--beside {folder / 'student'}"
        )
    else:
        untrained = students.load(folder / "student")
        before = judge(untrained, embed(untrained, pairs), protocol, placed)
        found.rows[UNTRAINED] = before.renamed("student, untrained")
    if teacher.get("kind") == "fusion":
        found.notes.append(
            "no teacher's row: a fusion teacher leaves scores, not features; for it give "
            f"--beside {teacher.get('source') or teacher['name']}"
        )
    elif teacher.get("modalities"):  # a run without a teacher has none
        try:
            found.rows[TEACHER] = _teacher(record, pairs, protocol, placed)
        except CrosstillError as error:
            found.notes.append(f"no teacher's row: {error}")


def _teacher(
    record: dict[str, Any], pairs: Pairs, protocol: str, placed: Sequence[Placed]
) -> Evaluation:
    """The teacher's recall on the same images, from the cache that the run learnt from."""
    cache = Cache(record["cache"]["folder"])
    split = next((s for s in map(cache.split, set(cache.splits)) if _same(cache, s, pairs)), None)
    if split is None:
        raise InputError(f"{cache.folder} does not hold exactly these images and captions")
    # the cache orders images by id; a protocol with folds needs the dataset's order
    place = {example.image_id: position for position, example in enumerate(pairs.examples)}
    position = torch.tensor([place[cache.image_ids[row]] for row in split.images])
    image = cache.image_features(split.images[position.argsort().numpy()])
    owner = position[torch.from_numpy(split.owner)]
    order = owner.argsort(stable=True)  # as the dataset lists its captions
    rows = split.captions[order.numpy()]
    text, texts = cache.text_features(rows), [cache.texts[row] for row in rows]
    if placed and texts != captions(pairs.examples)[0]:
        raise InputError(f"{cache.folder} lists the captions in another order")
    name = Path(str(cache.teacher["name"])).name
    return Evaluation(
        f"teacher ({name})",
        protocols.run(protocol, image, text, of_texts(owner[order], texts)),
        cache.teacher["parameters"],
        extended=tuple(truth.of_features(image, text) for truth in placed),
    )


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
        teacher = read_record(Path(source))["teacher"]
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
