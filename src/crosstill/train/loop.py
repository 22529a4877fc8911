"""The training loop: batch, student, teacher rows, losses, weights, step."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosstill import artefacts, files, progress
from crosstill.balance import Balancer
from crosstill.cache import Cache, CacheBase
from crosstill.errors import ConfigError, MismatchError, NonFiniteError
from crosstill.evaluate.recall import Retrieval
from crosstill.fusion.matcher import Matcher
from crosstill.students.student import Student
from crosstill.teachers.base import truncation_note
from crosstill.train import checkpoint, checks, distributed, folder, optim, targets, warm, work
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.folder import Learner, Run
from crosstill.train.interrupt import Stop, stop_signals
from crosstill.train.step import Outcome

log = logging.getLogger(__name__)


def train(
    student: Learner | None,
    cache: CacheBase,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    command: str = "",
) -> Run:
    """Train a student to say what the cache's teacher said.

    Args:
        student: the student to train, which has the last weights afterwards; None when resuming,
            since the run keeps its own.
        cache: what the teacher said.
        config: all settings.
        out: the run's folder.
        resume: go on with the run in `out`; the result is bit for bit that of a run which was
            never interrupted, on the same hardware with the same number of processes.
        command: what the user typed, kept with the run.

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
    with files.writing(path), distributed.group() as group, ExitStack() as stack:
        losses, rule = checks.prepare(config, cache, group)
        if student:  # before the folder is touched, because it may refuse
            work.fit(student, cache, losses, config)
        if group.leads:
            files.writable_folder(path)
            stack.enter_context(files.locked(path))
            _prepare(path, config, student, cache, resume, command)
        group.wait()
        # read back even where it was just written: a run that is killed before its first
        # checkpoint starts from this folder, where tensors lie otherwise in memory, and the last
        # bits of a product depend on that
        learner = folder.learner(path / "student")
        beside = work.fit(learner, cache, losses, config)
        session = Session(path, learner, (losses, rule, beside), cache, config, group)
        stack.callback(session.close)
        session.run()
        if student is not None:
            student.load_state_dict(learner.state_dict())
    return Run(path)


def _prepare(
    path: Path,
    config: TrainConfig,
    student: Learner | None,
    cache: CacheBase,
    resume: bool,
    command: str,
) -> None:
    """Lay out or reopen the run's folder; say what of the cache cannot be learnt."""
    folder.check_links(path)
    if resume:
        folder.reopen(path)
        return
    folder.check_new(path)
    if student is None:
        raise ConfigError("a new run needs a student")
    folder.create(path, config, student, cache, command)
    bad = cache.header["quarantined"]
    if bad:
        log.warning("unreadable images left out: %d, listed in %s", bad, path / folder.QUARANTINE)
    used = [text for s in (config.train_split, config.val_split) for text in cache.captions(s)]
    if note := truncation_note({student.name: student}, used):
        log.warning(note)


class Session:
    """A run in progress: `parts` are losses, balancer, and what runs beside the student."""

    def __init__(
        self,
        path: Path,
        student: Learner,
        parts: tuple[nn.ModuleDict, Balancer, Any],
        cache: CacheBase,
        config: TrainConfig,
        group: Group,
    ) -> None:
        losses, rule, beside = parts
        checkpoint.seed_rng(config.seed)
        self.path, self.config, self.group, self.cache = path, config, group, cache
        self.student = student.to(group.device)
        work.freeze(student, config)
        self.losses, self.balance = losses.to(group.device), rule.to(group.device)
        self.optimizer = optim.build((student, self.losses), self.balance, config)
        self.stream, self.val = work.data(student, cache, self.losses, config, group)
        self.position = {"epoch": 0, "step": 0, "total": 0}
        self.best: dict[str, Any] = {"rsum": -1.0, "epoch": None}
        self._origin = _origin(path, beside)
        self._load()
        learning = (student, self.losses, self.balance, self.optimizer, config, group)
        self.step = work.step(cache, beside, *learning)
        self.events = folder.Events(path, self.position["total"]) if group.leads else None

    def run(self) -> None:
        """Train to the last epoch, saving on the way and when asked to stop."""
        total = self.config.epochs * self.stream.sampler.steps_per_epoch
        if self.group.leads:
            parts = self.student.parameters_by_part().items()
            log.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in parts))
        self.student.train()
        with stop_signals() as stop, self._bar(total) as bar:
            for epoch in range(self.position["epoch"], self.config.epochs):
                self._epoch(epoch, bar, stop)
        if self.group.leads:
            self._summarise()
        self.group.wait()

    def close(self) -> None:
        """Let go of the run's files."""
        if self.events is not None:
            self.events.close()

    def _epoch(self, epoch: int, bar: progress.Bar | None, stop: Stop) -> None:
        per_epoch = self.stream.sampler.steps_per_epoch
        began, waited, seen = time.perf_counter(), 0.0, 0.0
        for step, batch, wait in self.stream.ahead(epoch, self.position["step"]):
            outcome = self._guarded_step(batch, per_epoch)
            waited += wait
            self.position = {"epoch": epoch, "step": step + 1, "total": self.position["total"] + 1}
            seen = waited / (time.perf_counter() - began)
            if bar is not None:
                bar.advance(1, f"epoch {epoch + 1}/{self.config.epochs}, {seen:.0%} waiting")
            self._log(outcome)
            self._save_or_stop(step + 1 < per_epoch, stop)
        self._end_epoch(epoch, time.perf_counter() - began, seen)
        stop.obey()

    def _guarded_step(self, batch: Any, per_epoch: int) -> Outcome:
        """One step; if a loss is not finite, save the state before it and say where."""
        before = (checkpoint.rng_state(), _copied(self.balance))
        try:
            return self.step(batch, optim.lr_at(self.position["total"], per_epoch, self.config))
        except NonFiniteError as error:
            self.balance.load_state_dict(before[1])
            checkpoint.restore_rng(before[0])
            raise NonFiniteError(self._report(error, batch)) from None

    def _report(self, error: NonFiniteError, batch: Any) -> str:
        number = self.position["total"]
        rows = self.cache.split(self.config.train_split).images[batch.picked.images]
        captions = self.cache.split(self.config.train_split).captions[batch.picked.captions]
        if self.group.leads:
            self._save()
            record = {
                "error": str(error),
                "step": number,
                "image_ids": [self.cache.image_ids[row] for row in rows],
                "captions": [self.cache.texts[row] for row in captions],
            }
            files.write_json(self.path / "nonfinite.json", record)
        return (
            f"{error} at step {number}; the batch is in {self.path / 'nonfinite.json'} and the "
            f"state before it in {self.path / 'checkpoints'}: --resume replays that step"
        )

    def _log(self, outcome: Outcome) -> None:
        if self.events is None or self.position["total"] % self.config.log_every:
            return
        per_epoch = self.stream.sampler.steps_per_epoch
        self.events.write(
            self.position["total"],
            "step",
            epoch=self.position["epoch"],
            losses={name: value.item() for name, value in outcome.losses.items()},
            weights={name: value.item() for name, value in outcome.weights.items()},
            total=outcome.total.item(),
            lr=optim.lr_at(self.position["total"] - 1, per_epoch, self.config),
        )

    def _save_or_stop(self, within: bool, stop: Stop) -> None:
        due = self.position["step"] % self.config.save_every == 0
        # the end of an epoch saves by itself, after its validation
        if within and (due or stop.asked) and self.group.leads:
            self._save()
        if within:
            stop.obey()

    def _end_epoch(self, epoch: int, seconds: float, waiting: float) -> None:
        self.balance.end_epoch()
        self.position = {"epoch": epoch + 1, "step": 0, "total": self.position["total"]}
        if self.group.leads:
            found = self.val.recall(self.student)
            better = found.rsum > self.best["rsum"]
            if better:
                self.best = {"epoch": epoch + 1, "rsum": found.rsum, "val": found.to_json()}
                folder.save_best(self.path, self.student, self.best)
            self._tell(epoch, found, better, seconds, waiting)
            self._save()
        self.group.wait()

    def _tell(
        self, epoch: int, found: Retrieval, better: bool, seconds: float, waiting: float
    ) -> None:
        assert self.events is not None
        self.events.write(self.position["total"], "epoch", epoch=epoch + 1, val=found.to_json())
        log.info(
            "epoch %d/%d  val RSUM %.2f%s  %.0f s, %.0f%% waiting for data",
            epoch + 1,
            self.config.epochs,
            found.rsum,
            " (best)" if better else "",
            seconds,
            100 * waiting,
        )
        if waiting > 0.3:
            log.warning("the student waits for data; a faster disk would help more than a GPU")

    def _summarise(self) -> None:
        teacher = self.val.teacher_recall()
        summary = {
            "best": self.best,
            "teacher": teacher.to_json() if teacher else None,
            "parameters": self.student.parameters_by_part(),
            "steps": self.position["total"],
        }
        files.write_json(self.path / "metrics.json", summary)

    # --- state ---

    def state(self) -> checkpoint.State:
        """All that decides the rest of the run."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses.state_dict(),
            "balance": self.balance.state_dict(),
            "names": self._names(),
            "position": self.position,
            "best": self.best,
            **checkpoint.rng_state(),
        }

    def restore(self, state: checkpoint.State) -> None:
        """Become what `state` was taken from.

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
        self.losses.load_state_dict(state["losses"])
        self.balance.load_state_dict(state["balance"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.position, self.best = dict(state["position"]), dict(state["best"])
        checkpoint.restore_rng(state)

    def _names(self) -> dict[str, Any]:
        """What a checkpoint's rows belong to, the run it is of, and what its last bits hang on."""
        parameters = optim.names(student=self.student, losses=self.losses, balance=self.balance)
        return {
            "losses": list(self.balance.tasks),
            "parameters": parameters,
            "run": self._origin,
            "processes": [self.group.world, torch.get_num_threads()],
        }

    def _save(self) -> None:
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
        elif self.config.init_heads == "ridge":
            assert isinstance(self.cache, Cache) and isinstance(self.student, Student)
            several = targets.of(self.losses)
            warm.ridge_heads(self.student, self.cache, self.stream.split, several)

    def _bar(self, total: int) -> Any:
        done = self.position["total"]
        return progress.bar("training", total, done) if self.group.leads else nullcontext()


def _origin(path: Path, beside: Any) -> str:
    """Digest what decides a run: settings, losses' order, cache, and the live teacher's weights."""
    record = files.read_json(path / "config.json")
    teacher = beside.identity() if isinstance(beside, Matcher) else None
    kept = [record["settings"], record.get("losses"), record["cache"]["digest"], teacher]
    return files.digest_json(kept)


def _copied(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.state_dict().items()}
