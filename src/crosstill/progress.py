"""Progress on stderr: bars on a terminal, a line every tenth of the way elsewhere.

What other libraries would write there is kept back by `quiet`.
"""

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress as rich
from rich.console import Console

log = logging.getLogger(__name__)

_hidden = False  # whether this process shows no bar
QUIET = 10.0  # seconds that must pass before a job is worth a line in a log file


class Bar:
    """One bar; `advance` moves it and replaces the note at its end."""

    def __init__(self, progress: rich.Progress, task: rich.TaskID) -> None:
        self._progress, self._task = progress, task
        self._began, self._logged = time.monotonic(), 0

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        self._progress.advance(self._task, amount)
        task = self._progress.tasks[self._task]
        self._progress.update(self._task, rate=f"{task.speed:,.0f}/s" if task.speed else "")
        if note is not None:
            self._progress.update(self._task, note=note)
        tenths = int(10 * task.percentage / 100)
        logs = self._progress.disable and not _hidden and tenths > self._logged
        if logs and time.monotonic() - self._began > QUIET:
            self._logged = tenths
            log.info("%s: %d of %d", task.description, task.completed, task.total)


def hide() -> None:
    """Show no bar in this process: it works beside others that would overwrite it."""
    global _hidden
    _hidden = True


@contextmanager
def bar(label: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar with count, rate and time left while the block runs."""
    console = Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}"),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    silent = _hidden or not console.is_terminal
    with rich.Progress(*columns, console=console, disable=silent) as progress:
        task = progress.add_task(label, total=total, completed=done, rate="", note="")
        yield Bar(progress, task)


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keep other libraries' warnings, bars and log lines back while the block runs.

    Our own log lines come through. Not for threads: filters of warnings are the whole process's.

    Args:
        level: of the log lines that are kept back, and of all below it.
    """
    own = logging.getLogger("crosstill")
    levels = {own: own.level}
    effective = own.getEffectiveLevel()
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger) or logger.name.split(".")[0] == own.name:
            continue
        if logger.level:  # those without inherit from one that has
            levels[logger] = logger.level
            logger.level = max(logger.level, level + 1)
    # once for all: it makes each of hundreds of loggers forget what it had looked up
    own.setLevel(effective)
    transformers: Any = sys.modules.get("transformers.utils.logging")
    bars = transformers is not None and transformers.is_progress_bar_enabled()
    if bars:
        transformers.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, before in levels.items():
            logger.level = before
        own.setLevel(levels[own])
        if bars:
            transformers.enable_progress_bar()
