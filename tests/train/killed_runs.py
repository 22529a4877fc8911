"""Many small runs, each killed at a random moment and then resumed to its end.

    python killed_runs.py CACHE OUT FIRST LAST

Run `whole` is never killed; runs FIRST to LAST - 1 are. Every run is a process of its own, forked
from this one so that only this one pays for the imports. Prints how many kills struck.

A moment is drawn over the files that a run opens, renames and flushes as well as over time, so
that kills fall inside saves and not only between them.
"""

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent))

from crosstill.cache import Cache  # noqa: E402
from crosstill.train import TrainConfig, folder, train  # noqa: E402
from support import SETTINGS, small_student  # noqa: E402

WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree")


def on_file_event(act: Callable[[], None]) -> None:
    sys.addaudithook(lambda event, args: act() if event in WATCHED else None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(seed: int, events: int, seconds: float) -> None:
    """Die at a moment that the seed decides, within the events and seconds of a whole run."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        threading.Timer(draw.uniform(0, 0.9 * seconds), die).start()
        return
    left = iter(range(draw.randrange(events)))
    on_file_event(lambda: die() if next(left, None) is None else None)


def measured(work: Callable[[], object], note: Path) -> None:
    """Do the work and write down its file events and its seconds."""
    events = itertools.count()
    on_file_event(lambda: next(events))
    began = time.monotonic()
    work()
    note.write_text(f"{next(events)} {time.monotonic() - began}")


def run(cache: Path, out: Path) -> None:
    """Start the run, or go on with it."""
    opened = Cache(cache)
    resume = folder.is_run(out)
    student = None if resume else small_student(opened)
    train(student, opened, TrainConfig(**SETTINGS), out, resume=resume)


def in_child(*steps: Callable[[], object]) -> int:
    """Take the steps in a process of its own; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        for step in steps:
            step()
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    cache, out, first, last = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
    note, struck = out / "whole.txt", 0
    assert in_child(lambda: measured(lambda: run(cache, out / "whole"), note)) == 0
    events, seconds = note.read_text().split()
    for trial in range(first, last):
        go = partial(run, cache, out / f"run-{trial}")
        status = in_child(partial(arm, trial, int(events), float(seconds)), go)
        struck += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert in_child(go) == 0, f"run {trial} does not resume"
    sys.stdout.write(f"{struck}\n")


if __name__ == "__main__":
    main()
