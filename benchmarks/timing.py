"""Times that a busy machine spoils as little as possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def medians(works: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median CPU seconds of each work; they take turns, so that noise falls on all of them.

    CPU time counts all threads of the process: work moved to a helper thread is not hidden.
    The first round, which touches fresh memory, is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def report(name: str, found: dict[str, float], limit: str) -> dict[str, float]:
    """Print one line: `ratio` and the seconds behind it."""
    parts = ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in found.items() if k != "ratio")
    print(f"{name:8} {found['ratio']:.3f}  (wanted {limit})  {parts}", flush=True)
    return found
