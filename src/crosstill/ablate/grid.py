"""Run what a plan asks for, each run once, and go on where a killed grid was."""

import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosstill import cache as caches
from crosstill import files, progress, students
from crosstill.ablate.plan import Job, Plan
from crosstill.cache import CacheBase
from crosstill.errors import ConfigError, CrosstillError, DiskFullError, RunError
from crosstill.evaluate.bootstrap import Answers
from crosstill.train import folder, train
from crosstill.train.task import open_task, open_validation

log = logging.getLogger(__name__)

ANSWERS = "answers.npz"
DONE = "done.json"


def run(plan: Plan, cache: CacheBase, out: Path, workers: int | None = None) -> None:
    """Do the runs that are still to do.

    Args:
        plan: what to run.
        cache: what it learns from.
        out: the grid's folder; runs lie in `out/runs`, and tables in it share them.
        workers: runs at a time; None is one a GPU, or one.

    Raises:
        LockedError: another process is working on the grid.
        RunError: some runs failed; the others are finished.
    """
    workers = max(1, torch.cuda.device_count()) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers must be 1 or more, not {workers}")
    if folder.is_run(out):
        raise ConfigError(f"{out} holds a run; give a grid an --out of its own")
    files.writable_folder(out)
    files.writable_folder(out / "runs")
    with files.locked(out):
        files.sweep(out)
        plan.save(out)
        jobs = {job.key: job for job in plan.jobs()}
        todo = [job for job in jobs.values() if not finished(out, job.key)]
        log.info("%s: %d runs, %d of them to do", plan.table, len(jobs), len(todo))
        failed = []
        for count, (job, outcome) in enumerate(_results(todo, cache, out, workers), 1):
            what = f"{job.row}, seed {job.settings.seed}"
            if isinstance(outcome, Exception):
                failed.append(f"{what}: {outcome}")
                log.warning("[%d/%d] %s", count, len(todo), failed[-1])
            else:
                log.info("[%d/%d] %s: RSUM %.2f", count, len(todo), what, outcome)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(jobs)} runs failed, first {failed[0]}; the others are kept, "
            "and the same command tries these again"
        )


def devices(workers: int, gpus: int) -> list[str]:
    """Choose CUDA_VISIBLE_DEVICES for each worker; "" where there is no GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",")[:gpus] if given else [str(number) for number in range(gpus)]
    return [names[worker % gpus] if gpus else "" for worker in range(workers)]


def finished(out: Path, key: str) -> bool:
    """Tell whether a run of the grid is done."""
    return (out / "runs" / key / DONE).is_file()


def answers(path: Path) -> Answers:
    """Read how each validation query of a finished run fared.

    Raises:
        CorruptError: the file was damaged.
    """
    files.check_digest(path / ANSWERS, files.read_json(path / DONE)["answers"])
    with np.load(path / ANSWERS, allow_pickle=False) as arrays:
        return Answers(*(torch.from_numpy(arrays[name]) for name in ("image", "text", "owner")))


def _results(
    todo: list[Job], cache: CacheBase, out: Path, workers: int
) -> Iterator[tuple[Job, float | Exception]]:
    """Yield each job with its RSUM or its error, as they finish."""
    if workers == 1 or len(todo) < 2:
        for job in todo:
            yield job, _tried(job, cache, out)
        return
    # spawned, because a forked process may not use CUDA
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in devices(workers, torch.cuda.device_count()):
        places.put(place)
    stop = context.Event()
    arguments = (places, stop, os.getpid(), cache.folder, out)
    with ProcessPoolExecutor(workers, context, _start, arguments) as pool:
        with _uninterrupted():
            pending = {pool.submit(_work, job): job for job in todo}
        try:
            for future in as_completed(pending):
                outcome = future.result()
                if outcome is None:
                    raise KeyboardInterrupt
                yield pending[future], outcome
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _tried(job: Job, cache: CacheBase, out: Path) -> float | Exception:
    """Do one run; an error raised on purpose is returned, so that the others go on."""
    try:
        return _one(job, cache, out / "runs" / job.key)
    except DiskFullError:  # there is no room for the others either
        raise
    except CrosstillError as error:
        return error


def _one(job: Job, cache: CacheBase, path: Path) -> float:
    """Start a run or go on with it, and write down how its best student answers."""
    began = time.perf_counter()
    resume = folder.is_run(path)
    student = None
    if not resume:
        student = open_task(cache, job.settings).make_student(students.load_config(job.student))
    if not (path / "metrics.json").is_file():
        train(student, cache, job.settings, path, resume=resume, command=job.command)
    best = folder.learner(path / "best")
    split = cache.split(job.settings.val_split)
    fared = open_validation(cache, split, best, job.settings).answers(best)
    files.write_atomic(path / ANSWERS, lambda new: _save(new, fared))
    # a finished run will not be resumed, and its optimizer is twice as large as its student
    shutil.rmtree(path / "checkpoints", ignore_errors=True)  # a kill may have left a part
    minutes = (time.perf_counter() - began) / 60
    files.write_json(
        path / DONE, {"minutes": minutes, "answers": files.digest_file(path / ANSWERS)}
    )
    return fared.rsum


def _save(path: Path, fared: Answers) -> None:
    with path.open("wb") as file:
        np.savez(file, image=fared.image, text=fared.text, owner=fared.owner)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let processes that start here ignore Ctrl-C, but for the loop of a run, which obeys it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


# --- in a worker ---

_here: dict[str, Any] = {}


def _start(places: Any, stop: Any, parent: int, cache: Path, out: Path) -> None:
    """Take a GPU and open the cache once for all runs of this worker."""
    place = places.get()
    if place:
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    _die_with(parent)
    progress.hide()
    _here.update(cache=caches.open(cache), out=out, stop=stop)


def _work(job: Job) -> float | Exception | None:
    """Do one run; None if it was asked to stop."""
    stop = _here["stop"]
    if stop.is_set():
        return None
    try:
        return _tried(job, _here["cache"], _here["out"])
    except (KeyboardInterrupt, SystemExit):
        stop.set()  # or this worker would take the next run
        return None


def _die_with(parent: int) -> None:
    """End with the grid, where Linux can: this run's lock would outlive a killed grid."""
    library = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed while this process was still importing
        os._exit(1)
