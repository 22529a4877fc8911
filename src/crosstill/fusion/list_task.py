"""Teaching candidate lists: what a score cache teaches a dual encoder or a fusion model.

Each pair of a batch asks twice: its image ranks captions, its caption ranks images. Only the
listed pairs are in the student's graph.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crosstill import students, teachers
from crosstill.cache import Split
from crosstill.errors import ConfigError, MismatchError, ModelError
from crosstill.evaluate import CachedSplit
from crosstill.evaluate.embedding import Measured
from crosstill.evaluate.recall import Retrieval
from crosstill.fusion.lists import (
    FALSE,
    CandidateLists,
    Directions,
    DualInputs,
    ListBatch,
    ListStream,
    MatchedSplit,
)
from crosstill.fusion.matcher import PAIRS, Matcher
from crosstill.fusion.scores import ScoreCache
from crosstill.fusion.states import Sides
from crosstill.fusion.students import build
from crosstill.objectives.base import SIDES
from crosstill.students.student import Student
from crosstill.students.student_config import FusionConfig, StudentConfig
from crosstill.train import step, task
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.types import Features, Lists, States

log = logging.getLogger(__name__)

NOTHING = Features(torch.empty(0), torch.empty(0))


class ListTask:
    """Teach the scores of candidate lists that a fusion teacher left in a score cache.

    Args:
        cache: the score cache.
        config: all settings.
        group: this process, alone.

    Raises:
        ConfigError: a setting that cannot work here, or more negatives than candidates.
        MismatchError: a loss that needs features, or scores that the cache lacks.
    """

    def __init__(self, cache: ScoreCache, config: TrainConfig, group: Group) -> None:
        task.check_settings(cache, config, group)
        self.cache, self.config, self.group = cache, config, group
        self.losses = task.build_losses(cache, config)
        self._check_losses()
        self._check_counts()
        self.balance = task.build_balance(config, self.losses)
        self._judge: Matcher | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self._stream.sampler.steps_per_epoch

    @property
    def teacher_identity(self) -> Mapping[str, Any] | None:
        return self._judge.identity() if self._judge is not None else None

    def check(self, description: StudentConfig | FusionConfig) -> None:
        self._check_kind(description.kind, description.name)

    def make_student(self, description: StudentConfig | FusionConfig) -> Student | Matcher:
        self.check(description)
        config, captions = self.config, self.cache.captions(self.config.train_split)
        if isinstance(description, StudentConfig):
            return students.build(description, captions=captions, seed=config.seed)
        source = self.cache.teacher["source"]
        return build(description, captions, config.seed, source)

    def fit(self, student: Student | Matcher) -> None:
        self._check_kind(student.kind, student.name)
        if isinstance(student, Student) and student.config.widths:
            raise MismatchError(
                f"widths of {student.name}: are learnt from the rows of a feature cache; leave "
                "widths out"
            )
        if isinstance(student, Matcher):
            for loss in task.named_losses(self.losses).values():
                loss.expect_logits()
            if self.config.teacher is not None:
                self._judge = _open_judge(self.config.teacher, student)

    def start(self, student: Student | Matcher) -> None:
        config, ways = self.config, list_ways(self.losses, isinstance(student, Matcher))
        self.student = student
        train, val = (self.cache.split(name) for name in (config.train_split, config.val_split))
        self._ranker: Ranker
        if isinstance(student, Matcher):
            self._ranker = PairRanker(student, self._judge, ways.hardest)
            freeze(student, config)
            inputs: Any = Sides(student, self.cache, train)
        else:
            self._ranker = CosineRanker(student, config.normalise is True)
            for side in SIDES.get(config.freeze, ()):
                getattr(student, f"{side}_tower").requires_grad_(False)
            inputs = DualInputs(self.cache, train, student, config)
        self._val = self.open_validation(self.cache, val, student, config)
        self._stream = ListStream(self.cache, train, inputs, ways, config, self.group)

    def initialise(self) -> None:
        """Leave the student as it is: a score cache has no features to fit heads to."""

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, ListBatch, float]]:
        return self._stream.ahead(epoch, first)

    def backward(self, batch: ListBatch) -> step.Outcome:
        lists = self.rank(batch)
        losses = {
            name: loss.rank(lists) if loss.lists else loss(lists.features, NOTHING, lists.ids)
            for name, loss in task.named_losses(self.losses).items()
        }
        outcome, total = step.weigh(losses, self.balance, lists.features)
        total.backward()
        return outcome

    def rank(self, batch: ListBatch) -> Lists:
        """Score a batch's lists by the student, with gradient."""
        with step.autocast(self.config, self.group.device):
            return self._ranker.rank(batch)

    def after(self, batch: ListBatch) -> None:
        """Store nothing: no loss that keeps teacher rows can read a score cache."""

    def validate(self) -> Measured:
        return self._val.measure(self.student)

    def teacher(self) -> Retrieval | None:
        return self._val.teacher_recall()

    def teacher_cosines(self) -> dict[str, float]:
        return self._val.teacher_cosines()

    def rows_of(self, batch: ListBatch) -> tuple[list[str], list[str]]:
        return task.named_rows(self.cache, self.config, batch.picked)

    @staticmethod
    def open_validation(
        cache: ScoreCache, split: Split, student: Student | Matcher, config: TrainConfig
    ) -> task.Validation:
        if isinstance(student, Student):
            return CachedSplit(cache, split, student, config.freeze)
        if config.towers == "frozen":
            student.freeze_towers()
        return MatchedSplit(cache, split, Sides(student, cache, split))

    def _check_losses(self) -> None:
        cache, config, losses = self.cache, self.config, task.named_losses(self.losses)
        blind = [name for name, loss in losses.items() if loss.lists is None]
        if blind:
            raise MismatchError(
                f"{cache.folder} is a score cache, and these losses need features: "
                f"{', '.join(blind)}; use --recipe dcd, cprd or info_nce, or make a cache of a "
                "dual encoder's features"
            )
        if self.group.world > 1:
            raise ConfigError(
                "a run from a score cache uses one process; start it without torchrun"
            )
        for name in ("chunk_size", "compile"):
            if getattr(config, name):
                raise ConfigError(f"{name}: a run from a score cache cannot use it; leave it out")
        taught = [name for name, loss in losses.items() if loss.needs]
        if taught and config.negatives == "batch":
            raise ConfigError(
                "negatives = batch: no teacher scored the batch's own pairs, and "
                f"{', '.join(taught)} needs scores; use negatives=hardest or random"
            )
        if taught and cache.scores is None and config.teacher is None:
            raise MismatchError(
                f"{cache.folder} was made without a teacher, and {', '.join(taught)} needs "
                "scores; use --recipe info_nce, or set teacher to a fusion model's folder"
            )

    def _check_counts(self) -> None:
        """Refuse more negatives than the shortest list has."""
        cache, config, ways = self.cache, self.config, list_ways(self.losses)
        fewest = dict(zip(("image", "text"), cache.least_false(config.train_split), strict=True))
        least = min(fewest.values())
        if config.drawn and not config.teacher and config.drawn > least:
            log.warning(
                "drawn = %d: some lists of %s hold only %d", config.drawn, cache.folder, least
            )
        partners = {"image": "captions of an image", "text": "images of a caption"}
        for way in ways.names:
            count = FALSE if config.teacher else fewest[way]
            count = config.drawn or count if config.teacher else min(config.drawn or count, count)
            count = config.batch_size - 1 if config.negatives == "batch" else count
            if ways.hardest > count:
                raise ConfigError(
                    f"hardest = {ways.hardest}: only {count} false {partners[way]} to choose from "
                    f"(split {config.train_split!r} of {cache.folder}); set hardest lower, "
                    "batch_size or drawn higher, or make the score cache with more --false and "
                    "--false-images"
                )

    def _check_kind(self, kind: str, name: str) -> None:
        """Refuse settings that one kind of student gives no meaning."""
        config = self.config
        if kind == "encoder":
            rules = {
                f"towers = {config.towers}: {name} is a dual encoder; use freeze": (
                    config.towers != "frozen"
                ),
                f"fusion_lr = {config.fusion_lr}: {name} is a dual encoder, which has no fusion "
                "layers; leave fusion_lr out": config.fusion_lr != 1,
                f"teacher = {config.teacher}: only a fusion student has a teacher score beside it; "
                "a dual encoder learns the cache's scores": config.teacher is not None,
            }
        else:
            rules = {
                f"negatives = {config.negatives}: a teacher beside the student finds the hardest; "
                "leave teacher or negatives out": (
                    config.teacher is not None and config.negatives != "hardest"
                ),
                f"freeze = {config.freeze}: {name} is a fusion model; use towers=frozen or "
                "towers=train": config.freeze != "none",
                "balance = gradnorm: a fusion model has no embeddings; use another": (
                    config.balance.get("name") == "gradnorm"
                ),
            }
        for complaint, applies in rules.items():
            if applies:
                raise ConfigError(complaint)


def list_ways(losses: nn.ModuleDict, fusion: bool = True) -> Directions:
    """Return which candidate lists the losses read, and how many negatives at most.

    A loss without a teacher reads a dual encoder's batch, so that lists would be encoded in vain.
    """
    inputs = [
        loss.lists
        for loss in task.named_losses(losses).values()
        if loss.lists and (fusion or loss.needs)
    ]
    if not inputs:
        return Directions((), 0)
    directions = {direction for lists in inputs for direction in lists.directions}
    return Directions(tuple(sorted(directions)), max(lists.hardest for lists in inputs))


def freeze(student: Matcher, config: TrainConfig) -> None:
    """Let everything of a fusion model learn but the towers, or those too."""
    student.requires_grad_(True)
    if config.towers == "frozen":
        student.freeze_towers()


def _open_judge(source: str, student: Matcher) -> Matcher:
    """Open the fusion teacher that scores a fusion student's lists as they come."""
    judge = teachers.load(source, student.device)
    if not isinstance(judge, Matcher):
        raise ModelError(f"teacher = {source}: no fusion model, so it cannot score pairs")
    if judge.towers_digest() != student.towers_digest():
        raise MismatchError(
            f"teacher = {source}: its towers are not the student's, which it has to share; make "
            "a score cache of it instead"
        )
    return judge.requires_grad_(False).eval()


class Ranker(Protocol):
    """The way in which one kind of student scores candidate lists."""

    def rank(self, batch: ListBatch) -> Lists:
        """Score a batch's lists, with gradient."""


class CosineRanker:
    """Score lists by a dual encoder's cosines.

    Args:
        student: the dual encoder.
        normalise: whether losses get unit rows.
    """

    def __init__(self, student: Student, normalise: bool) -> None:
        self._student, self._normalise = student, normalise

    def rank(self, batch: ListBatch) -> Lists:
        rows = self._student(batch.images, batch.texts, self._normalise)
        image, text = rows.image.float(), rows.text.float()
        own = Features(image[batch.pairs[0]], text[batch.pairs[1]])
        sides = {"image": (own.image, text), "text": (own.text, image)}
        scores = {
            way: torch.einsum("bd,bnd->bn", sides[way][0], sides[way][1][lists.partners])
            for way, lists in batch.lists.items()
        }
        return _lists(scores, batch.lists, batch.ids, own)


class PairRanker:
    """Score lists by a fusion model, each listed pair once.

    Args:
        student: the fusion model.
        judge: a fusion teacher that scores the lists as they come, if any; it shares the
            student's towers.
        hardest: negatives that go on to the student from what the judge has scored.
    """

    def __init__(self, student: Matcher, judge: Matcher | None, hardest: int) -> None:
        self._student, self._judge, self._hardest = student, judge, hardest

    def rank(self, batch: ListBatch) -> Lists:
        towers = tower_states(self._student, batch)
        lists = batch.lists
        if self._judge is not None:
            lists = {way: self._judged(self._judge, way, batch, towers) for way in lists}
        sides = _projected(self._student, *towers)
        return _lists(self._scores(sides, lists, batch), lists, batch.ids, None)

    def _scores(
        self, sides: tuple[States, States], lists: dict[str, CandidateLists], batch: ListBatch
    ) -> dict[str, Tensor]:
        pairs = [_pairs(way, listed.partners, batch) for way, listed in lists.items()]
        distinct, inverse = torch.unique(torch.cat(pairs), dim=0, return_inverse=True)
        scores = self._student.score_states(
            sides[0].take(distinct[:, 0]), sides[1].take(distinct[:, 1])
        )
        parts = scores.float()[inverse].split([len(part) for part in pairs])
        return {
            way: part.view(listed.partners.shape)
            for (way, listed), part in zip(lists.items(), parts, strict=True)
        }

    def _judged(
        self, judge: Matcher, way: str, batch: ListBatch, towers: tuple[States, States]
    ) -> CandidateLists:
        """Score a list by the judge, and cut it to the true partner and the hardest."""
        listed = batch.lists[way]
        with torch.no_grad():
            sides = _projected(judge, *towers)
            chunks = _pairs(way, listed.partners, batch).split(PAIRS)
            scores = torch.cat(
                [
                    judge.score_states(*(s.take(c) for s, c in zip(sides, chunk.T, strict=True)))
                    for chunk in chunks
                ]
            ).view(listed.partners.shape)
        false = scores[:, 1:].masked_fill(~listed.valid[:, 1:], -torch.inf)
        order = false.argsort(dim=1, descending=True)[:, : self._hardest] + 1
        order = torch.cat([torch.zeros_like(order[:, :1]), order], dim=1)
        return CandidateLists(
            *(part.gather(1, order) for part in (listed.partners, listed.valid, scores))
        )


def tower_states(model: Matcher, batch: ListBatch) -> tuple[States, States]:
    """Return the towers' states of a batch: kept ones as they are, else the towers run."""
    if isinstance(batch.images, States):
        return batch.images, batch.texts
    return model.encode_mixed(list(batch.images)), model.encode_texts(batch.texts)


def _projected(model: Matcher, image: States, text: States) -> tuple[States, States]:
    return model.project(image, "image"), model.project(text, "text")


def _pairs(way: str, partners: Tensor, batch: ListBatch) -> Tensor:
    """List the rows of images and of texts for every entry of a (B, N) list: (B N, 2)."""
    own = batch.pairs[0 if way == "image" else 1][:, None].expand_as(partners)
    both = (own, partners) if way == "image" else (partners, own)
    return torch.stack([side.flatten() for side in both], dim=1)


def _lists(
    scores: dict[str, Tensor], lists: dict[str, CandidateLists], ids: Tensor, own: Features | None
) -> Lists:
    teacher = {way: listed.teacher for way, listed in lists.items() if listed.teacher is not None}
    return Lists(scores, teacher, {way: listed.valid for way, listed in lists.items()}, ids, own)
