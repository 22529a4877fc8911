"""A model beside those it should be compared with: its teacher, itself before training, others.

Each kind of model is measured by a `Measure` of its own, found by the model's `kind`. The seconds
of a whole set count the model's own work: encoding of decoded pixels and plain captions, and the
scores of all pairs. Reading and decoding photos does not count.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from crosstill import students
from crosstill.cache import Cache, Split
from crosstill.data import Pairs
from crosstill.errors import ConfigError, CrosstillError, InputError
from crosstill.evaluate import evaluation, extended
from crosstill.evaluate.embedding import BATCH, Stopwatch, captions, embed, readable, sound
from crosstill.evaluate.recall import WHOLE, by_protocol, check_protocol
from crosstill.evaluate.truth import of_texts
from crosstill.formats import by_length
from crosstill.models import CONFIG, cuts, read_record
from crosstill.models import open as open_model
from crosstill.teachers.base import Model, Teacher, truncation_note

MODEL, TEACHER, UNTRAINED, BESIDE = "model", "teacher", "untrained", "beside"
WARM_UP = 16  # images and captions that are embedded before the clock starts

Work = Generator[None, None, evaluation.Cost]  # stops after every timed piece


@dataclass(frozen=True)
class Options:
    """The options of a measurement.

    Attributes:
        protocol: see `recall.by_protocol`; fusion models take those of a whole split.
        efficiency: also measure what the models cost, on one thread.
        strict: raise at the first image that cannot be read.
        beside: other models to measure on the same images.
        sample: time fusion models on so many pairs, and leave their recall out.
        truths: files of extended ground truth, see `crosstill.evaluate.extended`.
        annotations: the JSON in which captions have COCO's ids.
        finder: a dual encoder whose candidates the model, a fusion model, re-ranks.
        top: how many candidates of each query to re-rank; None is 20.
        blend: see `crosstill.fusion.rerank`.
    """

    protocol: str = "full"
    efficiency: bool = False
    strict: bool = False
    beside: Sequence[str] = ()
    sample: int | None = None
    truths: Sequence[Path] = ()
    annotations: Path | None = None
    finder: str | None = None
    top: int | None = None
    blend: float | None = None


class Result(Protocol):
    """The numbers of a measurement, and remarks on them."""

    @property
    def notes(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]:
        """Return the numbers."""
        ...

    def table(self) -> str:
        """Format the numbers as a Markdown table."""
        ...


class Measure(Protocol):
    """The measurement of models of one kind on a split.

    Attributes:
        pairwise: whether a model scores I x T pairs; else it embeds I + T images and captions.
    """

    pairwise: ClassVar[bool]

    def row(
        self,
        model: Any,
        name: str,
        pairs: Pairs,
        options: Options,
        placed: Sequence[extended.Placed],
    ) -> evaluation.Row:
        """Measure a model's recall on images that were found `readable`."""
        ...

    def time(self, model: Any, pairs: Pairs, sample: int) -> Work:
        """Time a model on all images and captions, piece by piece."""
        ...


class EmbeddingMeasure:
    """Measures encoders: everything is embedded once, and recall and seconds are of all pairs."""

    pairwise: ClassVar[bool] = False

    def row(
        self,
        model: Teacher,
        name: str,
        pairs: Pairs,
        options: Options,
        placed: Sequence[extended.Placed],
    ) -> evaluation.Row:
        """As `Measure.row`."""
        return evaluation.judge(model, embed(model, pairs), options.protocol, placed).renamed(name)

    def time(self, model: Teacher, pairs: Pairs, sample: int) -> Work:
        """As `Measure.time`, after a small pass that is not counted; there is no sample."""
        texts, _ = captions(pairs.examples)
        watch = Stopwatch()
        rows: list[Tensor] = []
        model.embed_texts(texts[:WARM_UP])
        for pixels in sound(pairs, model.preprocess):
            stack = torch.stack(pixels)
            if not rows:
                model.embed_images(stack[:WARM_UP])
            with watch.running():
                rows.append(model.embed_images(stack))
            yield
        words = torch.empty(len(texts), model.dim)
        for chunk in by_length(map(len, texts), BATCH):
            with watch.running():
                words[chunk] = model.embed_texts([texts[row] for row in chunk])
            yield
        for image in torch.cat(rows).split(BATCH):  # so that a large set's scores need not be held
            with watch.running():
                image @ words.T
        return evaluation.Cost(len(pairs) + len(texts), watch.seconds)


# by a model's kind; models that read pairs are an annex, so what measures them is found by name
MEASURES = {
    "encoder": "crosstill.evaluate.compare:EmbeddingMeasure",
    "matcher": "crosstill.fusion.measure:PairMeasure",
}
RERANK = "crosstill.fusion.measure:rerank_models"


def measure_of(model: Model) -> Measure:
    """Return how models of this kind are measured."""
    measure: Measure = resolve_name(MEASURES[model.kind])()
    return measure


def whole_set(
    models: Mapping[str, Any], pairs: Pairs, sample: int = 0
) -> dict[str, evaluation.Cost]:
    """Time every model on all images and captions, piece by piece in turn.

    Args:
        models: name → model; dual encoders are timed in full.
        pairs: I images and their T captions; images that one model cannot read are left out.
        sample: pairs that a fusion model is timed on; its I x T are extrapolated from them.
    """
    pairs = readable(pairs, [model.preprocess for model in models.values()])
    works = {name: measure_of(model).time(model, pairs, sample) for name, model in models.items()}
    costs: dict[str, evaluation.Cost] = {}
    with evaluation.one_thread():
        while len(costs) < len(works):
            for name, work in works.items():
                if name not in costs:
                    try:
                        next(work)
                    except StopIteration as end:
                        costs[name] = end.value
    return costs


@dataclass
class Comparison:
    """Rows by their role: the model, perhaps its teacher and itself untrained, and others."""

    rows: dict[str, evaluation.Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> evaluation.Row:
        """Return the row of the model itself."""
        return self.rows[MODEL]

    def to_json(self) -> dict[str, Any]:
        """Return the model's numbers at the top level, each other row under its role."""
        beside = [row.to_json() for role, row in self.rows.items() if role.startswith(BESIDE)]
        own = {r: row.to_json() for r, row in self.rows.items() if r in (TEACHER, UNTRAINED)}
        return {**self.model.to_json(), **own, **({BESIDE: beside} if beside else {})}

    def table(self) -> str:
        """Format the rows: teacher, model, untrained student, then the others."""
        order = [TEACHER, MODEL, UNTRAINED, *(role for role in self.rows if BESIDE in role)]
        rows = [self.rows[role] for role in order if role in self.rows]
        truths = {row.name: row.extended for row in rows if isinstance(row, evaluation.Evaluation)}
        further = f"\n\n{extended.table(truths)}" if any(truths.values()) else ""
        return evaluation.table(rows) + further


def measure(source: str, pairs: Pairs, options: Options = Options()) -> Result:
    """Evaluate a model beside others, or as the second of two stages where there is a finder.

    Args:
        source: a run, a student, a dual encoder or a fusion model; with a finder a fusion model.
        pairs: the images and captions, usually one split of a dataset.
        options: what to measure.

    Raises:
        ConfigError: options that do not go together.
        InputError: see `run` and `crosstill.fusion.measure.rerank_models`.
    """
    if options.finder is None:
        if options.top is not None:
            raise ConfigError(
                f"--top {options.top}: re-ranks what a dual encoder finds; give --finder"
            )
        if options.blend is not None:
            raise ConfigError(
                f"--blend {options.blend}: adds what a dual encoder says; give --finder"
            )
        return run(source, pairs, options)
    whole = options.sample is None and options.protocol == "full"
    if options.beside or options.truths or not whole:
        raise ConfigError(
            "--finder: prints a table of its own, without --beside, --sample, --truth "
            "and --protocol; leave them out"
        )
    rerank: Callable[..., Result] = resolve_name(RERANK)
    depth = {} if options.top is None else {"top": options.top}
    return rerank(
        source,
        options.finder,
        pairs,
        efficiency=options.efficiency,
        blend=options.blend,
        strict=options.strict,
        **depth,
    )


def run(source: str, pairs: Pairs, options: Options = Options()) -> Comparison:
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
    pairs = pairs.captioned()
    place_truths = extended.opened(options.truths, options.annotations)
    place_truths(pairs.examples)  # refuses what is of another dataset before anything is computed
    others = [*options.beside, *cuts(source)]
    sources = {MODEL: source, **{f"{BESIDE} {i}": other for i, other in enumerate(others)}}
    models: dict[str, Any] = {role: open_model(place, "live") for role, place in sources.items()}
    pairwise = {role for role, model in models.items() if measure_of(model).pairwise}
    _check(bool(pairwise), options)
    comparison, names = (
        Comparison(),
        {
            role: f"student ({Path(place).name})" if Path(place, "best").is_dir() else place
            for role, place in sources.items()
        },
    )
    model = models[MODEL]
    if len(models) == 1 and not pairwise:
        # one pass over the photos, where several models need all to be checked first
        rows = embed(model, pairs, options.strict)
        ids = set(rows.image_ids)
        kept = tuple(example for example in pairs.examples if example.image_id in ids)
        pairs = replace(pairs, examples=kept, quarantine=rows.quarantine)
        placed = place_truths(pairs.examples)
        comparison.rows[MODEL] = evaluation.judge(model, rows, options.protocol, placed).renamed(
            names[MODEL]
        )
    else:
        pairs = readable(pairs, [model.preprocess for model in models.values()], options.strict)
        placed = place_truths(pairs.examples)
        for role, model in models.items():
            row = measure_of(model).row(model, names[role], pairs, options, placed)
            comparison.rows[role] = row
    _remark(comparison, pairs, placed)
    readers = {names[role]: model for role, model in models.items()}
    note = truncation_note(readers, captions(pairs.examples)[0])
    comparison.notes += [note] if note else []
    if (Path(source) / CONFIG).is_file() and (Path(source) / "student").is_dir():
        _add_run(comparison, Path(source), MODEL in pairwise, pairs, options.protocol, placed)
    if options.efficiency:
        _add_costs(comparison, source, models, pairs, options.sample)
    return comparison


def _check_sample(options: Options) -> None:
    sample = options.sample
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample}: fusion models are timed on at least 1 pair")
    if sample is not None and not options.efficiency:
        raise ConfigError(f"--sample {sample}: the pairs that are timed; add --efficiency")


def _check(pairwise: bool, options: Options) -> None:
    """Refuse options that do not fit the models, before anything is computed."""
    check_protocol(options.protocol)
    if pairwise and options.protocol not in WHOLE:
        raise ConfigError(
            f"protocol {options.protocol!r} is for embeddings; with a fusion model use 'full' on "
            "a dataset of that size"
        )
    if options.sample is not None and not pairwise:
        raise ConfigError("--sample: times fusion models, and none is here; leave it out")


def _remark(comparison: Comparison, pairs: Pairs, placed: Sequence[extended.Placed]) -> None:
    """Add what a person should know of the rows."""
    row = comparison.model
    shared = row.recall.shared if isinstance(row, evaluation.Evaluation) else 0
    comparison.notes += evaluation.remarks(pairs.quarantine, len(pairs), shared)
    comparison.notes += [note for truth in placed for note in truth.notes]
    for role, row in comparison.rows.items():
        if isinstance(row, evaluation.Evaluation) and row.recall.warning:
            name = "" if role == MODEL else f"{row.name}: "
            comparison.notes.append(f"{name}{row.recall.warning}")


def _add_run(
    comparison: Comparison,
    folder: Path,
    pairwise: bool,
    pairs: Pairs,
    protocol: str,
    placed: Sequence[extended.Placed],
) -> None:
    """Add the rows of a run that need no more than the run itself."""
    record = read_record(folder)
    teacher = record["teacher"]
    if pairwise:
        comparison.notes.append(
            "no row of the untrained student: it would be another full matrix; for it give "
            f"--beside {folder / 'student'}"
        )
    else:
        untrained = students.load(folder / "student")
        before = evaluation.judge(untrained, embed(untrained, pairs), protocol, placed)
        comparison.rows[UNTRAINED] = before.renamed("student, untrained")
    if teacher.get("kind") == "fusion":
        comparison.notes.append(
            "no teacher's row: a fusion teacher leaves scores, not features; for it give "
            f"--beside {teacher.get('source') or teacher['name']}"
        )
    elif teacher.get("modalities"):  # a run without a teacher has none
        try:
            comparison.rows[TEACHER] = _teacher(record, pairs, protocol, placed)
        except CrosstillError as error:
            comparison.notes.append(f"no teacher's row: {error}")


def _teacher(
    record: dict[str, Any], pairs: Pairs, protocol: str, placed: Sequence[extended.Placed]
) -> evaluation.Evaluation:
    """Measure the teacher on the same images, from the cache that the run learnt from."""
    cache = Cache(record["cache"]["folder"])
    splits = (cache.split(name).paired() for name in sorted(set(cache.splits)))
    split = next((split for split in splits if _same(cache, split, pairs)), None)
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
    return evaluation.Evaluation(
        f"teacher ({name})",
        by_protocol(protocol, image, text, of_texts(owner[order], texts)),
        cache.teacher["parameters"],
        extended=tuple(truth.of_features(image, text) for truth in placed),
    )


def _same(cache: Cache, split: Split, pairs: Pairs) -> bool:
    ids = {cache.image_ids[row] for row in split.images}
    texts = sum(len(example.captions) for example in pairs.examples)
    return ids == {example.image_id for example in pairs.examples} and len(split.captions) == texts


def _add_costs(
    comparison: Comparison,
    source: str,
    models: dict[str, Any],
    pairs: Pairs,
    sample: int | None,
) -> None:
    """Time the whole set and, of what embeds, single items; the models take turns."""
    if TEACHER in comparison.rows:
        teacher = read_record(Path(source))["teacher"]
        try:
            models = {
                **models,
                TEACHER: open_model(teacher["source"] or teacher["name"], "encoder"),
            }
        except CrosstillError as error:
            comparison.notes.append(f"the teacher's latency was not measured: {error}")
    encoders = {role: model for role, model in models.items() if not measure_of(model).pairwise}
    latency = evaluation.measure_latency(encoders)
    # a fusion model that was run for its recall was timed then
    untimed = models if sample is not None else encoders
    spent = {role: row.cost for role, row in comparison.rows.items() if row.cost}
    spent |= whole_set(untimed, pairs, sample or 0) if untimed else {}
    for role, value in evaluation.compared(spent).items():
        row = comparison.rows[role]
        comparison.rows[role] = replace(row, cost=value, efficiency=latency.get(role))
        if value.estimated:
            comparison.notes.append(
                f"≈ {row.name}: seconds extrapolated from {value.sample:,} timed pairs of "
                f"{value.passes:,}"
            )
