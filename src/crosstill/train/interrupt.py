"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class Stop:
    """Whether someone asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; the second one ends the process at once."""
        if self.asked:
            os._exit(128 + number)
        self.signal = number
        log.info("stopping after this step; a checkpoint is being saved")

    def obey(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked:
            raise SystemExit(128 + (self.signal or 0))


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a question that the loop asks after each step."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {s: signal.signal(s, stop.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
