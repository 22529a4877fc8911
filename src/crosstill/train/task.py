"""The kinds of teaching: what one kind of cache teaches one kind of student.

A `Task` is all that the training loop needs of either. `PairTask` here teaches a dual encoder the
rows of a feature cache; `ListTask` of `crosstill.fusion.list_task` teaches the candidate lists of
a score cache. A Task's constructor makes the losses and the balancer and refuses settings and
losses that the cache cannot serve, so that a grid can ask it about every row before a run starts.
"""

import logging
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from crosstill import balance, objectives, students
from crosstill.balance import Balancer
from crosstill.cache import Cache, CacheBase, Split, centring
from crosstill.cache.centring import AnyCache
from crosstill.errors import ConfigError, MismatchError
from crosstill.evaluate import CachedSplit
from crosstill.evaluate.agreement import open_split
from crosstill.evaluate.bootstrap import Answers
from crosstill.evaluate.embedding import Measured
from crosstill.evaluate.recall import Ranking, Retrieval
from crosstill.objectives import Input, Objective
from crosstill.objectives.base import SIDES
from crosstill.objectives.parts import first_rows
from crosstill.objectives.wrappers import ROWS, PerWidth, principal_axes
from crosstill.students.student import Student, Tokens
from crosstill.students.student_config import FusionConfig, StudentConfig
from crosstill.train import distributed, layers
from crosstill.train.batches import Batch, Sampler, Stream, reads_raw
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.layers import PairedLayers
from crosstill.train.ridge_heads import start_heads
from crosstill.train.step import Outcome, autocast, backward_in_chunks, check_precision, weigh
from crosstill.types import Features, Ids

log = logging.getLogger(__name__)

QUEUE = "queue_size"  # what losses with a queue call its length
# settings that only a score cache gives a meaning, with their defaults
ONLY_LISTS = {"negatives": "hardest", "drawn": None, "towers": "frozen", "fusion_lr": 1.0}


class Validation(Protocol):
    """A split of a cache, on which students of one kind are measured.

    Attributes:
        caveat: what a reader of the recall has to know, in sentences; "" where every query ranks
            the whole split.
    """

    caveat: str

    def recall(self, student: Any) -> Ranking:
        """Measure the student's recall, or without pairs its agreement with the teacher."""

    def measure(self, student: Any) -> Measured:
        """Measure the student's recall, and how alike its rows are."""

    def answers(self, student: Any) -> Answers:
        """Compute the chance of each query to be answered, for a paired bootstrap."""

    def teacher_recall(self) -> Retrieval | None:
        """Measure the teacher's recall on the same rows; None where the cache cannot tell."""

    def teacher_cosines(self) -> dict[str, float]:
        """Compute the teacher's mean cosines on the same rows, of the sides that there are."""


class Task(Protocol):
    """What one kind of cache teaches one kind of student.

    The loop calls `fit` once, with the student as the user gave it or as the run kept it; `start`
    once, with the student that learns, which is the same or one with the same weights; then
    `initialise` in a new run, and the rest as often as there are steps and epochs.

    Attributes:
        losses: all losses, by name.
        balance: their weighting rule.
        steps_per_epoch: steps of one epoch; known after `start`.
        teacher_identity: what decides the output of a teacher that scores beside the student;
            None without one. Known after `fit`.
    """

    losses: nn.ModuleDict
    balance: Balancer
    steps_per_epoch: int
    teacher_identity: Mapping[str, Any] | None

    def __init__(self, cache: Any, config: TrainConfig, group: Group) -> None:
        """Make losses and balancer.

        Raises:
            ConfigError, MismatchError: a setting or a loss that does not fit the cache.
        """

    def check(self, description: StudentConfig | FusionConfig) -> None:
        """Refuse a student that this cache cannot teach, before it is built.

        Raises:
            ConfigError, MismatchError: it is of the wrong kind or width, or a setting forbids it.
        """

    def make_student(self, description: StudentConfig | FusionConfig) -> Any:
        """Build the untrained student.

        Raises:
            ConfigError, MismatchError: as `check`.
            ConfigError, ModelError: a student that cannot be built or read.
        """

    def fit(self, student: Any) -> None:
        """Refuse a student that does not fit, and fit student and losses to each other.

        Raises:
            ConfigError, MismatchError, ModelError: it is of the wrong kind, width or towers.
        """

    def start(self, student: Any) -> None:
        """Take the student that learns, freeze what must not, and open the batches."""

    def initialise(self) -> None:
        """Set the start weights of a new run's student, where the settings ask for better ones."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, Any, float]]:
        """Yield (step, batch, seconds waited for it) from step `first` to the epoch's end."""

    def backward(self, batch: Any) -> Outcome:
        """Compute the losses, weigh them, and add the gradient of their sum to the parameters.

        Raises:
            NonFiniteError: a loss is NaN or infinite; there is no gradient.
        """

    def after(self, batch: Any) -> None:
        """Let the losses store what they keep of a batch, after its optimizer step."""

    def validate(self) -> Measured:
        """Measure the student on the validation split, and how alike its rows are."""

    def teacher(self) -> Retrieval | None:
        """Measure the teacher's recall as `validate` does; None where the cache cannot tell."""

    def teacher_cosines(self) -> dict[str, float]:
        """Compute the teacher's mean cosines as `validate` does, of the sides that there are."""

    def rows_of(self, batch: Any) -> tuple[list[str], list[str]]:
        """List the image ids and the captions of a batch."""

    @staticmethod
    def open_validation(cache: Any, split: Split, student: Any, config: TrainConfig) -> Validation:
        """Open a split of a cache of this kind: see `open_validation`."""


def open_validation(
    cache: CacheBase, split: Split, student: Any, config: TrainConfig
) -> Validation:
    """Open a split for a student that trains or that was read back from a run.

    Args:
        cache: what the student learns or has learnt from.
        split: of that cache.
        student: its towers are frozen where the settings say so, and then run only once.
        config: the settings of its run.
    """
    kind: type[Task] = resolve_name(cache.task)
    return kind.open_validation(cache, split, student, config)


def open_task(cache: CacheBase, config: TrainConfig, group: Group | None = None) -> Task:
    """Make the Task of a cache's kind.

    Args:
        cache: any kind of cache.
        config: all settings.
        group: the processes that train; None is this one alone.

    Raises:
        ConfigError, MismatchError: a setting or a loss that does not fit the cache.
    """
    kind: type[Task] = resolve_name(cache.task)
    return kind(cache, config, group or distributed.alone())


class PairTask:
    """Teach a dual encoder the teacher's features of image-caption pairs.

    Args:
        cache: a feature cache, of both modalities, one or none.
        config: all settings.
        group: the processes that train.

    Raises:
        ConfigError: a setting that cannot work.
        MismatchError: a loss that reads what the teacher did not leave.
    """

    teacher_identity = None
    student: Student

    def __init__(self, cache: Cache, config: TrainConfig, group: Group) -> None:
        sampler = check_settings(cache, config, group)
        self.config, self.group = config, group
        self.cache = learnt_rows(cache, config)
        self.losses = build_losses(cache, config)
        self._sides = _sides(cache.split(config.train_split))
        self._check_pairs(sampler.paired)
        self._check_needs()
        for name, default in ONLY_LISTS.items():
            if getattr(config, name) != default:
                raise ConfigError(
                    f"{name} = {getattr(config, name)}: only a run from a score cache has "
                    "candidate lists or a fusion student; leave it out"
                )
        layers.check(config, self.losses, cache, group.world)
        self.balance = build_balance(config, self.losses)
        self._layers: PairedLayers | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self._stream.sampler.steps_per_epoch

    def check(self, description: StudentConfig | FusionConfig) -> None:
        if description.kind != "encoder":
            raise self._no_lists(description.name)
        if self.cache.dim is not None and description.dim not in (None, self.cache.dim):
            raise MismatchError(
                f"student {description.name}: its dim = {description.dim} does not fit the "
                f"teacher's {self.cache.dim} in {self.cache.folder}; leave dim out"
            )

    def make_student(self, description: StudentConfig | FusionConfig) -> Student:
        self.check(description)
        assert isinstance(description, StudentConfig)
        return students.build(
            description,
            dim=self.cache.dim,
            captions=self.cache.captions(self.config.train_split),
            seed=self.config.seed,
        )

    def fit(self, student: Student) -> None:
        if student.kind != "encoder":
            raise self._no_lists(student.name)
        _wrap_widths(student, self.losses, self.cache, self.config)
        if self.cache.dim is not None and student.dim != self.cache.dim:
            raise MismatchError(
                f"the student's embedding width is {student.dim} and the teacher's is "
                f"{self.cache.dim}; build the student with dim = {self.cache.dim}"
            )
        self._layers = layers.pair(student, self.losses, self.config, self.cache)

    def start(self, student: Student) -> None:
        self.student, config = student, self.config
        if config.normalise is False and self.cache.modalities and not self.cache.raw:
            log.warning(
                "normalise = false: %s keeps unit rows alone, so losses see the student's as they "
                "come and the teacher's at length 1; `crosstill cache --raw` keeps both",
                self.cache.folder,
            )
        if self.cache.means and self.group.leads:
            log.info(centring.note(self.cache))
        for side in SIDES.get(config.freeze, ()):
            getattr(student, f"{side}_tower").requires_grad_(False)
        for side in {"image", "text"} - self._sides:  # of which there is nothing to learn
            getattr(student, f"{side}_tower").requires_grad_(False)
            getattr(student, f"{side}_head").requires_grad_(False)
        if self._layers is not None:
            self._layers.follow(student)
        train, val = (self.cache.split(name) for name in (config.train_split, config.val_split))
        self._stream = Stream(self.cache, train, student, config, self.group)
        self._val = self.open_validation(self.cache, val, student, config)
        self._wrapped = self.group.wrap(student)
        self._encode = torch.compile(self._wrapped) if config.compile else self._wrapped

    def initialise(self) -> None:
        start_heads(self.student, self.cache, self._stream.split, self.config)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, Batch, float]]:
        return self._stream.ahead(epoch, first)

    def backward(self, batch: Batch) -> Outcome:
        size, count = self.config.chunk_size, self.group.share_of(self.config.batch_size)
        if size is not None and size < count:
            chunks = [slice(start, start + size) for start in range(0, count, size)]
            return backward_in_chunks(
                lambda rows: self._features(batch, rows),
                chunks,
                lambda features: self._weighed(batch, features),
                self._wrapped,
                self.group,
            )
        if self._layers is not None:
            self._layers.listen()
        outcome, total = self._weighed(batch, self._features(batch, slice(None)))
        total.backward()
        return outcome

    def after(self, batch: Batch) -> None:
        for loss in named_losses(self.losses).values():
            teacher, _, ids = loss_rows(loss, batch.teacher, batch.teacher, batch.ids)
            loss.update(teacher, ids)

    def validate(self) -> Measured:
        return self._val.measure(self.student)

    def teacher(self) -> Retrieval | None:
        return self._val.teacher_recall()

    def teacher_cosines(self) -> dict[str, float]:
        return self._val.teacher_cosines()

    def rows_of(self, batch: Batch) -> tuple[list[str], list[str]]:
        return named_rows(self.cache, self.config, batch.picked)

    @staticmethod
    def open_validation(
        cache: Cache, split: Split, student: Student, config: TrainConfig
    ) -> CachedSplit:
        return open_split(learnt_rows(cache, config), split, student, config.freeze)

    def _features(self, batch: Batch, rows: slice) -> Features:
        """Encode some rows of this process's share; each distinct image passes once."""
        distinct, image_of = torch.unique(batch.image_of[rows], return_inverse=True)
        texts = batch.texts
        part = Tokens(*(t[rows] for t in texts)) if isinstance(texts, Tokens) else texts[rows]
        with autocast(self.config, self.group.device):
            features = self._encode(batch.images[distinct], part, self.config.normalise is True)
        return Features(features.image[image_of].float(), features.text.float())

    def _weighed(self, batch: Batch, share: Features) -> tuple[Outcome, Tensor]:
        """Compute and weigh the losses of the whole batch from this process's share of it."""
        features = self.group.gather(share)
        inputs = self._inputs(batch, features)
        losses = {
            name: loss(*loss_rows(loss, *inputs[loss.reads], batch.ids))
            for name, loss in named_losses(self.losses).items()
        }
        return weigh(losses, self.balance, features)

    def _inputs(self, batch: Batch, features: Features) -> dict[Input, tuple[Any, Any]]:
        """Make the input of student and teacher once for each that some loss declares."""
        paired = self._layers.take(batch.picked, batch.views) if self._layers is not None else None
        inputs: dict[Input, tuple[Any, Any]] = {}
        for reads in dict.fromkeys(loss.reads for loss in named_losses(self.losses).values()):
            if reads.kind == "hidden" and paired is not None:
                inputs[reads] = paired
            elif reads.kind == "masked":
                image = self._masked_images(batch, reads.ratio)
                inputs[reads] = Features(image, features.text), batch.teacher
            else:
                inputs[reads] = features, batch.teacher
        return inputs

    def _masked_images(self, batch: Batch, ratio: float) -> Tensor:
        """Embed the batch's photos with a share of their patches blanked: (B, D)."""
        student = self.student
        patch = layers.patch_size(student) or 1
        photos = layers.blank(batch.images, patch, ratio, student.preprocess.mean)
        with autocast(self.config, self.group.device):
            return student.encode_image(photos).float()[batch.image_of]

    def _check_pairs(self, paired: int) -> None:
        """Refuse losses that need pairs, or both sides, where there are none.

        Args:
            paired: pairs in a batch.
        """
        losses, alone = named_losses(self.losses), len(self._sides) == 1
        unfit = {
            name: loss
            for name, loss in losses.items()
            if (loss.pairs and not paired)
            or (alone and (loss.across or (loss.needs and not loss.needs & self._sides)))
            or (loss.reads.kind == "hidden" and "image" not in self._sides)
        }
        if not unfit:
            return
        split = f"{self.cache.folder}, split {self.config.train_split!r}"
        lacking = "pairs of photo and caption"
        if alone:
            lacking = "texts" if "image" in self._sides else "photos"
        elif self.cache.split(self.config.train_split).pairs:
            split = f"paired_share = {self.config.paired_share}"
        fitting = [
            name
            for name in objectives.known()
            if not (loss := objectives.LOSSES.find_class(name, Objective)).pairs
            and not (alone and loss.across)
        ]
        raise MismatchError(
            f"{split}: has no {lacking}, which {', '.join(unfit)} "
            f"{'need' if len(unfit) > 1 else 'needs'}; leave it out (--set losses.NAME=false) or "
            f"choose among {', '.join(fitting)}"
        )

    def _check_needs(self) -> None:
        """Refuse losses that need features which the teacher did not leave."""
        has = self.cache.modalities
        needs = {
            name: (loss.needs & self._sides) - has
            for name, loss in named_losses(self.losses).items()
        }
        starved = [name for name, lacking in needs.items() if lacking]
        if not starved:
            return
        lacking = sorted({side for name in starved for side in needs[name]})
        remedy = "use --recipe info_nce"
        if has:
            (side,) = has
            remedy += f""" --set 'losses.instance.side="{side}"'"""
        raise MismatchError(
            f"{self.cache.folder} has no {' and '.join(lacking)} features of a teacher, which "
            f"{', '.join(starved)} {'need' if len(starved) > 1 else 'needs'}; {remedy}"
        )

    def _no_lists(self, name: str) -> MismatchError:
        return MismatchError(
            f"{name} is a fusion model, which learns candidate lists, and {self.cache.folder} "
            "holds none; make a score cache: crosstill cache FUSION-MODEL DATA --out DIR, or, to "
            "train a new fusion model, crosstill cache none DATA --false 31 --out DIR"
        )


def learnt_rows(cache: AnyCache, config: TrainConfig) -> AnyCache:
    """Return the cache with the teacher's rows as the student learns them.

    Raises:
        ConfigError: rows were to be centred, and losses read raw ones.
    """
    raw = reads_raw(cache, config)
    if raw and config.center is True:
        raise ConfigError(
            "center = true: centred rows have length 1, and normalise = false learns raw ones; "
            "leave one of the two out"
        )
    center = False if raw else config.center
    return centring.centred(cache, config.train_split, center)


def check_settings(cache: CacheBase, config: TrainConfig, group: Group) -> Sampler:
    """Refuse settings that cannot work with any kind of student.

    Returns:
        What would draw the batches.

    Raises:
        ConfigError: a setting that was removed, a precision that the device would emulate, or a
            batch that cannot be drawn.
        MismatchError: heads by least squares or centred rows, and no features for either.
    """
    if config.targets != "joined":
        raise ConfigError(
            f"targets = {config.targets}: was removed, joined rows are one teacher; leave it out"
        )
    check_precision(config, group.device)
    group.check(config.batch_size)
    # asked for their refusals: a split without rows, a batch that is larger than the split
    cache.split(config.val_split)
    sampler = Sampler(
        cache.split(config.train_split),
        config.batch_size,
        config.captions_per_image,
        seed=0,
        share=config.paired_share,
    )
    if config.init_heads == "ridge" and "image" not in cache.modalities:
        raise MismatchError(
            f"init_heads = ridge needs the teacher's image features, and {cache.folder} has none; "
            "use init_heads=random"
        )
    if config.center is True and not cache.modalities:
        raise MismatchError(
            f"center = true: {cache.folder} holds no features of a teacher to centre; leave it out"
        )
    return sampler


def loss_rows(loss: Objective, student: Any, teacher: Any, ids: Ids) -> tuple[Any, Any, Any]:
    """Return the rows of a batch that a loss is given, of student and teacher, with their ids.

    The ids are a tensor where all rows that it is given are pairs. Layers are of photos, whatever
    belongs to these.
    """
    if ids.paired == len(ids.image) == len(ids.text):
        return student, teacher, ids.image
    if not loss.pairs or loss.reads.kind == "hidden":
        return student, teacher, ids
    mine, theirs = (first_rows(features, ids.paired) for features in (student, teacher))
    return mine, theirs, ids.image[: ids.paired]


def _sides(split: Split) -> frozenset[str]:
    """Return which of "image" and "text" a split has rows of."""
    rows = {"image": split.images, "text": split.captions}
    return frozenset(side for side, places in rows.items() if len(places))


def fit_queues(cache: CacheBase, config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Shrink the queues of a new run to its training captions, where nobody set their length.

    A longer queue would hold captions twice. The run keeps the lengths in its settings, so that it
    resumes with them whatever the dataset has become; runs that did not keep them have 8,192 slots.

    Returns:
        The settings, and a line on each queue that is shorter than its loss makes it.

    Raises:
        ConfigError: a length that was set is too long, or there is no such loss.
    """
    split = cache.split(config.train_split)
    most = max(len(split.images), len(split.captions))
    changes, lines = [], []
    for name, chosen in config.losses.items():
        slots = objectives.spelt_out(name, chosen).get(QUEUE)
        if not isinstance(slots, int) or slots <= most:  # building the loss refuses other types
            continue
        rows = f"the {most:,} captions of split {config.train_split!r} in {cache.folder}"
        if QUEUE in chosen:
            raise ConfigError(
                f"losses.{name}.{QUEUE} = {slots} (recipe {config.recipe}): a queue of {slots:,} "
                f"slots is longer than {rows}, and would hold captions twice; set it lower, as "
                f"--set losses.{name}.{QUEUE}={most}, or use a larger dataset"
            )
        changes.append(f"losses.{name}.{QUEUE}={most}")
        lines.append(f"{name}: a queue of {most:,} slots in place of {slots:,}, as long as {rows}")
    return config.changed(changes), lines


def build_losses(cache: CacheBase, config: TrainConfig) -> nn.ModuleDict:
    """Build the losses of a run, in the order of the settings."""
    keys = _keys(cache, config)
    width = cache.dim or 1  # that of a cache without features is refused by what the losses need
    return nn.ModuleDict(
        {
            name: objectives.build(name, dim=width, seed=config.seed, keys=keys, **options)
            for name, options in config.losses.items()
        }
    )


def _keys(cache: CacheBase, config: TrainConfig) -> Tensor:
    """Return the keys of the training photos that losses with pairs see."""
    split = cache.split(config.train_split)
    return cache.keys[split.images[split.captioned] if split.pairs else split.images]


def build_balance(config: TrainConfig, losses: nn.ModuleDict) -> Balancer:
    """Build the weighting rule of a run's losses.

    Raises:
        ConfigError: no such rule or option, or a rule that needs gradients which a loss has not.
    """
    options = dict(config.balance)
    rule = balance.build(options.pop("name", "fixed"), list(losses), **options)
    blind = [*layers.reading(losses, "hidden"), *layers.reading(losses, "masked")]
    if rule.needs_gradients and blind:
        raise ConfigError(
            f"balance = {config.balance['name']}: compares gradients at the embeddings, where "
            f"{', '.join(blind)} has none; use another balance"
        )
    return rule


def named_losses(losses: nn.ModuleDict) -> dict[str, Objective]:
    """Return the losses by name, typed."""
    return dict(losses.items())  # type: ignore[arg-type]


def named_rows(cache: CacheBase, config: TrainConfig, picked: Any) -> tuple[list[str], list[str]]:
    """List the image ids and the captions of the picked rows of the training split."""
    split = cache.split(config.train_split)
    return (
        [cache.image_ids[row] for row in split.images[picked.images]],
        [cache.texts[row] for row in split.captions[picked.captions]],
    )


def _wrap_widths(
    student: Student, losses: nn.ModuleDict, cache: Cache, config: TrainConfig
) -> None:
    """Set a new student's axes, and wrap its losses of embeddings for each of its widths.

    Losses that read layers stay as they are: layers have no widths. Nothing happens to a student
    of one width.
    """
    if not student.config.widths:
        return
    if cache.dim not in (None, student.dim):
        return  # the check of the widths refuses it next
    if cache.modalities and torch.equal(student.axes.cpu(), torch.eye(student.dim)):
        student.axes.copy_(_principal_axes(cache, config.train_split))
    keys = _keys(cache, config)
    for name, options in config.losses.items():
        loss: Any = losses[name]
        if loss.reads.kind == "hidden":
            continue
        parts = {
            width: objectives.build(name, dim=width, seed=config.seed, keys=keys, **options)
            for width in student.widths[:-1]
        }
        axes = student.axes.detach().clone()
        unit, unit_teacher = config.normalise is True, not reads_raw(cache, config)
        losses[name] = PerWidth(loss, parts, axes, unit, unit_teacher)


def _principal_axes(cache: Cache, split: str) -> Tensor:
    """Compute the principal axes of a split's teacher features, from evenly spread rows."""
    rows, sides = cache.split(split), []
    has = cache.modalities & _sides(rows)
    if "image" in has:
        sides.append(cache.image_features(rows.images[_evenly(len(rows.images))]))
    if "text" in has:
        sides.append(cache.text_features(rows.captions[_evenly(len(rows.captions))]))
    return principal_axes(sides)


def _evenly(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, ROWS)).astype(int)
