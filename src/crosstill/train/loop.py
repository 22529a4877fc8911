"""The training loop: batch, losses, weights, step, validate, keep the best."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosstill import artefacts, files, progress
from crosstill.cache import CacheBase
from crosstill.errors import ConfigError, MismatchError, NonFiniteError
from crosstill.evaluate.embedding import Measured
from crosstill.evaluate.likeness import describe_alike
from crosstill.pixels import count_left_out, read_classes
from crosstill.teachers.base import truncation_note
from crosstill.train import checkpoint, distributed, folder
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.folder import Learner, Run
from crosstill.train.step import (
    Outcome,
    build_optimizer,
    load_optimizer,
    lr_at,
    parameter_names,
)
from crosstill.train.task import Task, fit_queues, named_losses, open_task

log = logging.getLogger(__name__)

FIRST_STEPS = 100  # in which rows may be alike before anything is said


def train(
    student: Learner | None,
    cache: CacheBase,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    command: str = "",
) -> Run:
    """Train a student to agree with a cache's teacher.

    Args:
        student: the student to train, which has the last weights afterwards; None when resuming,
            since the run keeps its own.
        cache: the teacher's outputs.
        config: all settings.
        out: the run's folder.
        resume: go on with the run in `out`; the result is bit for bit that of a run which was
            never interrupted, on the same hardware with the same number of processes.
        command: the command line of the user, kept with the run.

    Raises:
        ConfigError: a setting that cannot work, a folder that holds another run.
        MismatchError: the student's width or a loss's need does not fit the cache.
        LockedError: another process is using the folder.
        NonFiniteError: a loss became NaN or infinite; a checkpoint to replay it was saved.
    """
    path = Path(out)
    if resume:
        config = folder.check_resumable(path, config, cache)
    else:
        folder.check_new(path)
        config = fitted(cache, config)
    with files.writing(path), distributed.group() as group, ExitStack() as stack:
        task = open_task(cache, config, group)
        if student is not None:  # before the folder is touched, because it may refuse
            task.fit(student)
        if group.leads:
            files.writable_folder(path)
            stack.enter_context(files.locked(path))
            _prepare(path, config, student, cache, resume, command)
        group.wait()
        # read back even where it was just written: a run that is killed before its first
        # checkpoint starts from this folder, where tensors lie otherwise in memory, and the last
        # bits of a product depend on that
        learner = folder.learner(path / "student")
        if student is None:
            task.fit(learner)
        session = Session(path, learner, task, cache, config, group)
        stack.callback(session.close)
        learn(session)
        if student is not None:
            student.load_state_dict(learner.state_dict())
    return Run(path)


def fitted(cache: CacheBase, config: TrainConfig) -> TrainConfig:
    """Fit the queues of a new run to its cache, and say which are shorter than usual.

    Raises:
        ConfigError: see `crosstill.train.task.fit_queues`.
    """
    config, lines = fit_queues(cache, config)
    for line in lines if distributed.leads() else ():
        log.info(line)
    return config


def learn(session: Session) -> None:
    """Take every step that is left of a run, and keep the best student.

    Raises:
        NonFiniteError: a loss became NaN or infinite; a checkpoint to replay it was saved.
        KeyboardInterrupt, SystemExit: the user asked to stop; the state is saved.
    """
    config, task, optimizer = session.config, session.task, session.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    session.student.drops = config.dropout
    session.student.train()
    with checkpoint.stop_signals() as stop, session.bar() as bar:
        for epoch in range(session.position["epoch"], config.epochs):
            clock = Clock()
            for step, batch, waited in task.batches(epoch, session.position["step"]):
                if session.group.world > 1:
                    # each process draws as much dropout as its rows need; only one's state is kept
                    checkpoint.seed_step(config.seed, session.position["total"])
                optimizer.zero_grad(set_to_none=True)
                with session.replayable(batch):
                    outcome = task.backward(batch)  # losses, weights, gradient of their sum
                if config.clip_norm:
                    nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                for options in optimizer.param_groups:
                    options["lr"] = session.lr() * options.get("factor", 1.0)
                optimizer.step()
                task.after(batch)  # queues and banks

                session.position = {
                    "epoch": epoch,
                    "step": step + 1,
                    "total": session.position["total"] + 1,
                }
                waiting = clock.share(waited)
                if bar is not None:
                    bar.advance(1, f"epoch {epoch + 1}/{config.epochs}, {waiting:.0%} waiting")
                session.log(outcome)
                if step + 1 < task.steps_per_epoch:  # an epoch's end saves after its validation
                    if stop.asked or (step + 1) % config.save_every == 0:
                        session.save()
                    stop.obey()
            task.balance.end_epoch()
            session.position = {**session.position, "epoch": epoch + 1, "step": 0}
            if session.group.leads:
                seconds = clock.seconds
                session.keep_best(task.validate(), outcome, seconds, clock.waiting)
            session.save()
            session.group.wait()
            stop.obey()
    session.finish()


def _prepare(
    path: Path,
    config: TrainConfig,
    student: Learner | None,
    cache: CacheBase,
    resume: bool,
    command: str,
) -> None:
    """Lay out or reopen the run's folder; warn of what cannot be learnt from the cache."""
    folder.check_links(path)
    if resume:
        folder.reopen(path)
        return
    folder.check_new(path)
    if student is None:
        raise ConfigError("a new run needs a student")
    folder.create(path, config, student, cache, command)
    left_out = count_left_out(read_classes(path / folder.QUARANTINE))
    if left_out:
        log.warning("%s, listed in %s", left_out, path / folder.QUARANTINE)
    used = [text for s in (config.train_split, config.val_split) for text in cache.captions(s)]
    if note := truncation_note({student.name: student}, used):
        log.warning(note)


class Clock:
    """Measures an epoch, and the share of it that was spent waiting for batches."""

    def __init__(self) -> None:
        self._began, self._waited, self.waiting = time.perf_counter(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def share(self, waited: float) -> float:
        """Add seconds of waiting, and return their share so far."""
        self._waited += waited
        self.waiting = self._waited / self.seconds
        return self.waiting


class Session:
    """The state of a run in progress, and its folder.

    Attributes:
        position: epochs that are over, steps of the present one, and steps of the whole run.
        best: the best epoch and its recall.
    """

    def __init__(
        self,
        path: Path,
        student: Learner,
        task: Task,
        cache: CacheBase,
        config: TrainConfig,
        group: Group,
    ) -> None:
        checkpoint.seed_rng(config.seed)
        self.path, self.config, self.group, self.cache = path, config, group, cache
        self.task, self.student = task, student.to(group.device)
        task.losses.to(group.device)
        task.balance.to(group.device)
        task.start(self.student)
        modules, fast = (student, task.losses), student.fusion_layers()
        self.optimizer = build_optimizer(modules, task.balance, config, fast)
        self.position = {"epoch": 0, "step": 0, "total": 0}
        self.best: dict[str, Any] = {"rsum": -1.0, "epoch": None}
        self._cosines: dict[str, float] = {}  # of the validation before
        self._warned = False
        self._origin = _origin(path, task)
        self._load()
        self.events = folder.Events(path, self.position["total"]) if group.leads else None

    def bar(self) -> AbstractContextManager[progress.Bar | None]:
        """Show the run's progress, and how large the student is."""
        if not self.group.leads:
            return nullcontext()
        parts = self.student.parameters_by_part().items()
        log.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in parts))
        total = self.config.epochs * self.task.steps_per_epoch
        return progress.bar("training", total, self.position["total"])

    def lr(self, before: int = 0) -> float:
        """Return the learning rate of the next step, or of one of those before it."""
        step = self.position["total"] - before
        return lr_at(step, self.task.steps_per_epoch, self.config)

    @contextmanager
    def replayable(self, batch: Any) -> Iterator[None]:
        """Save the state before a step whose losses are not finite, and name its batch.

        Raises:
            NonFiniteError: as it was raised, with the place of the saved state.
        """
        balance = self.task.balance
        state = {name: value.clone() for name, value in balance.state_dict().items()}
        random = checkpoint.rng_state()
        try:
            yield
        except NonFiniteError as error:
            balance.load_state_dict(state)
            checkpoint.restore_rng(random)
            raise NonFiniteError(self._report(error, batch)) from None

    def _report(self, error: NonFiniteError, batch: Any) -> str:
        number, path = self.position["total"], self.path / "nonfinite.json"
        self.save()
        if self.group.leads:
            images, captions = self.task.rows_of(batch)
            record = {"error": str(error), "step": number, "image_ids": images}
            files.write_json(path, {**record, "captions": captions})
        return (
            f"{error} at step {number}; the batch is in {path} and the state before it in "
            f"{self.path / 'checkpoints'}: --resume replays that step"
        )

    def log(self, outcome: Outcome) -> None:
        """Write a line of events.jsonl, where one is due."""
        if self.events is None or self.position["total"] % self.config.log_every:
            return
        self.events.write(
            self.position["total"],
            "step",
            epoch=self.position["epoch"],
            losses={name: value.item() for name, value in outcome.losses.items()},
            weights={name: value.item() for name, value in outcome.weights.items()},
            total=outcome.total.item(),
            lr=self.lr(before=1),
        )

    def keep_best(
        self, measured: Measured, outcome: Outcome, seconds: float, waiting: float
    ) -> None:
        """Save the student if it is the best so far, report the epoch, warn of alike rows.

        Args:
            measured: on the validation split.
            outcome: of the epoch's last step.
            seconds: that the epoch took.
            waiting: share of them in which it waited for batches.
        """
        assert self.events is not None
        epoch, ranking = self.position["epoch"], measured.recall
        val, key = ranking.to_json(), ranking.key
        better = ranking.value > self.best.get(key, -1.0)
        if better:
            self.best = {"epoch": epoch, key: ranking.value, "val": val}
            self.best["mean_cosine"] = measured.cosines
            folder.save_best(self.path, self.student, self.best)
        self.events.write(
            self.position["total"],
            "epoch",
            epoch=epoch,
            val=val,
            mean_cosine=measured.cosines,
            teacher_mean_cosine=self.teacher_cosines,
        )
        if ranking.warning and epoch == 1:
            log.warning("validation: %s", ranking.warning)
        alike = self._alike(measured.cosines)
        log.info(
            "epoch %d/%d  val %s %.2f%s  %.0f s, %.0f%% waiting for data%s",
            epoch,
            self.config.epochs,
            ranking.name,
            ranking.value,
            " (best)" if better else "",
            seconds,
            100 * waiting,
            "  rows alike" if alike else "",
        )
        if alike and not self._warned:
            log.warning("the student's rows are alike: %s; %s", alike, self._remedy(outcome))
        self._warned = alike is not None
        if waiting > 0.3:
            log.warning("the student waits for data; a faster disk would help more than a GPU")

    @functools.cached_property
    def teacher_cosines(self) -> dict[str, float]:
        """The teacher's mean cosines on the validation split."""
        return self.task.teacher_cosines()

    def _alike(self, cosines: dict[str, float]) -> str | None:
        """Describe the sides whose rows are alike and do not come apart, or at the end still are.

        Rows of towers that begin at random are alike for the first steps. They come apart where
        what they have above the teacher's mean cosine falls by a tenth or more between validations.
        """
        before, self._cosines = self._cosines, cosines
        ended = self.position["epoch"] == self.config.epochs

        def stays(side: str) -> bool:
            if side not in before:
                return self.position["total"] >= FIRST_STEPS
            own = self.teacher_cosines.get(side, 0.0)
            return cosines[side] - own > 0.9 * (before[side] - own)

        staying = {side: mean for side, mean in cosines.items() if ended or stays(side)}
        return describe_alike(staying, self.teacher_cosines)

    def _remedy(self, outcome: Outcome) -> str:
        """Name the loss that is likely to pull rows into one point, and what to set."""
        losses = named_losses(self.task.losses)
        for name, loss in losses.items():
            if loss.apart:
                return f"likely {name}: set losses.{name}.{loss.apart}"
        parts = {name: float(outcome.weights[name] * outcome.losses[name]) for name in losses}
        largest = max(parts, key=parts.__getitem__)
        named = f"likely {largest}, the largest part of the total: " if len(parts) > 1 else ""
        split = self.cache.split(self.config.train_split)
        both = len(split.images) and len(split.captions)
        anchor = "info_nce" if split.pairs else "kd" if both else ""  # no pairs, no info_nce
        another = f", add losses.{anchor}=true" if anchor and anchor not in losses else ""
        return f"{named}set lr below {self.config.lr:g}{another}, or train longer"

    def finish(self) -> None:
        """Write the summary of a run that is over."""
        if self.group.leads:
            teacher = self.task.teacher()
            summary = {
                "best": self.best,
                "teacher": teacher.to_json() if teacher else None,
                "teacher_mean_cosine": self.teacher_cosines,
                "parameters": self.student.parameters_by_part(),
                "steps": self.position["total"],
            }
            files.write_json(self.path / "metrics.json", summary)
        self.group.wait()

    def close(self) -> None:
        """Close the run's files."""
        if self.events is not None:
            self.events.close()

    def state(self) -> checkpoint.State:
        """Collect all that decides the rest of the run."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.task.losses.state_dict(),
            "balance": self.task.balance.state_dict(),
            "names": self._names(),
            "position": self.position,
            "best": self.best,
            **checkpoint.rng_state(),
        }

    def restore(self, state: checkpoint.State) -> None:
        """Set student, losses, balancer, optimizer and random state to a saved `state`.

        Raises:
            MismatchError: its rows are of other losses or parameters, or in another order.
        """
        place = self.path / "checkpoints"
        ours = self._names()
        theirs = ours | state.get("names", {})  # older checkpoints have no names
        if theirs["run"] != ours["run"]:
            raise MismatchError(
                f"{place}: of a run with other settings, another cache or another live teacher; "
                "put back what this run was started with, or start it anew"
            )
        for kind in ("losses", "parameters"):
            if theirs[kind] != ours[kind]:
                raise MismatchError(
                    f"{place}: saved for the {kind} {', '.join(theirs[kind])}, and this run has "
                    f"{', '.join(ours[kind])}, so that rows would be taken for others; resume "
                    "with the crosstill that started the run, or start it anew"
                )
        if theirs["processes"] != ours["processes"] and self.group.leads:
            log.warning(
                "this run had %d processes of %d threads and goes on with %d of %d: it will not "
                "end with the same bits",
                *theirs["processes"],
                *ours["processes"],
            )
        self.student.load_state_dict(state["student"])
        self.task.losses.load_state_dict(state["losses"])
        self.task.balance.load_state_dict(state["balance"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.position, self.best = dict(state["position"]), dict(state["best"])
        checkpoint.restore_rng(state)

    def _names(self) -> dict[str, Any]:
        """Name the rows of a checkpoint, its run, and what its last bits depend on."""
        task = self.task
        parameters = parameter_names(student=self.student, losses=task.losses, balance=task.balance)
        return {
            "losses": list(self.task.balance.tasks),
            "parameters": parameters,
            "run": self._origin,
            "processes": [self.group.world, torch.get_num_threads()],
        }

    def save(self) -> None:
        """Save a checkpoint, in the process that leads; the others have the same state."""
        if not self.group.leads:
            return
        saved = self.path / "checkpoints"
        checkpoint.save(saved, self.position["total"], self.state(), self.config.keep)

    def _load(self) -> None:
        state = checkpoint.load_latest(self.path / "checkpoints")
        if state is not None:
            with artefacts.readable(self.path / "checkpoints"):
                self.restore(state)
            self.group.wait()  # until all have read it
            if self.group.leads:
                checkpoint.tidy(self.path / "checkpoints", self.position["total"], self.config.keep)
        else:
            self.task.initialise()


def _origin(path: Path, task: Task) -> str:
    """Digest what decides a run: settings, losses' order, cache, and the live teacher's weights."""
    record = files.read_json(path / "config.json")
    teacher = task.teacher_identity
    kept = [record["settings"], record.get("losses"), record["cache"]["digest"], teacher]
    return files.digest_json(kept)
