"""A small build killed at each of its writes, looked at after every kill, then let through.

    LD_PRELOAD=killing_writes.so python killed_writes.py FOLDER KIND

KIND is "first", "update" or "rebuild". Prints at how many writes it was killed. Checks and builds
are those of `killed_builds`.
"""

import ctypes
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from killed_builds import Trials, in_child

PHOTOS = 30


def prepared(place: Path, kind: str) -> tuple[Trials, Callable[[], None]]:
    """Photos and, but for a first build, an index of them as they were; and the build to kill."""
    trials, draw = Trials(place), random.Random(0)
    trials.change(draw, PHOTOS)
    if kind == "first":
        trials.index.mkdir()
        return trials, lambda: trials.build(False)
    assert in_child(lambda: trials.build(False)) == 0
    trials.change(draw, PHOTOS)
    (trials.root / "worse.jpg").write_bytes(b"no image")
    if kind == "rebuild":
        trials.bundle = trials.bundles[1]
    return trials, lambda: trials.build(kind == "rebuild")


def main() -> None:
    place, kind = Path(sys.argv[1]), sys.argv[2]
    killer = ctypes.CDLL(None)
    trials, build = prepared(place, kind)
    chosen, before, start = trials.bundle, trials.state(), place / "start"
    trials.index.rename(start)
    for change in itertools.count(1):
        shutil.rmtree(trials.index, ignore_errors=True)
        shutil.copytree(start, trials.index)
        trials.bundle, reader = chosen, trials.open()

        def killed(change: int = change) -> None:
            killer.arm(os.fsencode(trials.index), ctypes.c_long(change))
            build()

        status = in_child(killed)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, change
        trials.check(before, change)
        if reader:
            trials.serves(reader, before)
        assert in_child(lambda: trials.build(False)) == 0, f"does not go on after {change}"
        trials.finished(change)
    sys.stdout.write(f"{change - 1}\n")


if __name__ == "__main__":
    main()
