"""One small run in its own process, killed at a random moment: cache, run folder, seed (0: live).

The moment is drawn over the files that the run opens, renames and flushes as well as over time,
so that kills fall inside saves and not only between them.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent))

from crosstill.cache import Cache  # noqa: E402
from crosstill.train import TrainConfig, folder, train  # noqa: E402
from support import SETTINGS, small_student  # noqa: E402

COSTLY = 300  # file events in a whole run, about
SECONDS = 1.5  # a whole run takes, about


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(seed: int) -> None:
    draw = random.Random(seed)
    if draw.random() < 0.5:
        threading.Timer(draw.uniform(0, SECONDS), die).start()
        return
    left = draw.randrange(COSTLY)

    def count(event: str, args: tuple) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
            left -= 1
            if left < 0:
                die()

    sys.addaudithook(count)


def main() -> None:
    cache = Cache(sys.argv[1])
    out, seed = Path(sys.argv[2]), int(sys.argv[3])
    config = TrainConfig(**SETTINGS)
    resume = folder.is_run(out)
    student = None if resume else small_student(cache)
    if seed:
        arm(seed)
    train(student, cache, config, out, resume=resume)


if __name__ == "__main__":
    main()
