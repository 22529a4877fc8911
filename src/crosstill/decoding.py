"""Decode photos in worker processes that can be killed, within one budget of memory.

Whatever a file is made to do, it costs at most the seconds and the bytes below, and one photo.
`pixels` sends all but ordinary JPEG here; training, caching, evaluation, indexing and serving
share the workers and the budget, one set a process:

    with decoding.decode(data, path) as upright:  # uint8 (H, W, 3), counted in the budget
        small = resize(upright, ...)              # until the block ends

A worker imports numpy and Pillow, is started when it is first needed and ends with its parent.
Before every photo it asks the kernel to kill it after so many seconds of CPU time and to refuse
it more than so many bytes (see `rasters.serve`); one that died is replaced at the next photo.
Whoever decodes many photos does it in threads, `ahead` of their use; there Ctrl-C does not wait
for what they decode.
"""

from __future__ import annotations

import atexit
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from crosstill import rasters
from crosstill.errors import ImageError, RunError

BUDGET = 4 << 30  # bytes that decoding may take on a machine with plenty
ORDINARY = 64 << 20  # bytes that are set aside for a photo before its header is read
Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

PATIENCE = 120.0  # seconds by the clock that a worker may be silent, on however busy a machine


@contextmanager
def decode(data: bytes, path: str) -> Iterator[np.ndarray]:
    """Decode a file of any of `rasters.FORMATS` to upright RGB: uint8 (H, W, 3).

    Args:
        data: the file.
        path: what to call it.

    Raises:
        ImageError: whatever is wrong with it; also "takes too long to decode" and "too much
            memory".
        RunError: no worker can be started.
    """
    with _pool.decode(data, path) as upright:
        yield upright


@contextmanager
def memory(size: int, path: str) -> Iterator[None]:
    """Take bytes from the budget while the block runs; wait until there are so many.

    Raises:
        ImageError: the whole budget is smaller.
    """
    with _pool.budget.held(size, path):
        yield


@contextmanager
def in_threads(count: int = 4) -> Iterator[ThreadPoolExecutor]:
    """Make threads that read and decode photos.

    When the block fails or is interrupted, what has not begun is cancelled and what workers are
    decoding is killed, so that nobody waits for it.
    """
    threads = ThreadPoolExecutor(count, thread_name_prefix="decode")
    try:
        yield threads
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        stop()
        raise
    finally:
        threads.shutdown()


def ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], window: int, workers: int = 4
) -> Iterator[Loaded]:
    """Yield `load(item)` of all items in their order, loaded by threads before they are asked for.

    Args:
        load: reads and decodes, in a thread.
        items: what to load.
        window: items that are loaded, or being loaded, while the caller works on one.
        workers: threads.
    """
    waiting: deque[Future[Loaded]] = deque()
    with in_threads(workers) as threads:
        for item in items:
            waiting.append(threads.submit(load, item))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batches(
    load: Callable[[Item], Loaded], items: Sequence[Item], size: int
) -> Iterator[list[tuple[Item, Loaded]]]:
    """Yield items with what is loaded of them, `size` at a time; the next ones are being loaded."""
    loaded = zip(items, ahead(load, items, size), strict=True)
    while batch := list(islice(loaded, size)):
        yield batch


def stop() -> None:
    """Kill all workers: what they are decoding fails at once, later photos get new ones."""
    _pool.stop()


class Budget:
    """Bytes that all decoding of a process may take together."""

    def __init__(self, total: int | None = None) -> None:
        self._given, self._taken = total, 0
        self._changed = threading.Condition()

    @cached_property
    def total(self) -> int:
        """Bytes in all: as given, or half of what is free when the first photo is decoded."""
        return self._given or max(2 * ORDINARY, min(BUDGET, _free_memory() // 2))

    @contextmanager
    def held(self, size: int, path: str) -> Iterator[None]:
        """Wait until so many bytes are free, and take them while the block runs."""
        if size > self.total:
            asked, total = size >> 20, self.total >> 20
            raise ImageError(
                path, f"{rasters.OVERSIZE} ({asked} MB to decode it, {total} MB allowed)"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._taken + size <= self.total)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


class _Pool:
    """The workers of a process and its budget."""

    def __init__(self) -> None:
        self.budget = Budget()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()  # all of them,
        self._idle: list[_Worker] = []  # and those with nothing to do
        self._places = threading.Semaphore(max(2, len(os.sched_getaffinity(0))))

    @contextmanager
    def decode(self, data: bytes, path: str) -> Iterator[np.ndarray]:
        with ExitStack() as held, self._worker() as worker:
            held.enter_context(self.budget.held(ORDINARY, path))
            memory, upright = worker.ask(path, ORDINARY, data)
            if upright is None:
                held.close()  # who waits for more holds nothing
                held.enter_context(self.budget.held(memory, path))
                _, upright = worker.ask(path, memory)
            assert upright is not None
            taken = held.pop_all()
        with taken:
            yield upright

    def stop(self) -> None:
        with self._lock:
            workers, self._workers, self._idle = self._workers, set(), []
        for worker in workers:
            worker.kill()

    def disown(self) -> None:
        """Let go of what belongs to the process from which this one was forked."""
        for worker in self._workers:
            worker.disown()

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is None:
                worker = _Worker()
                with self._lock:
                    self._workers.add(worker)
            try:
                yield worker
            finally:
                with self._lock:
                    kept = worker.ready and worker in self._workers
                    if kept:
                        self._idle.append(worker)
                    else:
                        self._workers.discard(worker)
                if not kept:
                    worker.kill()


class _Worker:
    """One process.

    Attributes:
        ready: it can be given a photo; not so once it died, or an exchange with it was cut short.
    """

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        there.set_inheritable(True)
        folders = [folder for folder in sys.path if folder]
        alone = {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", rasters.__name__, str(there.fileno())]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                env=os.environ | alone | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the parent, which decides
            )
        except OSError as error:
            here.close()
            raise RunError(f"no process to decode photos can be started ({error})") from None
        finally:
            there.close()
        self._socket, self._stopped, self.ready = here, False, False
        here.settimeout(PATIENCE)
        try:
            rasters.receive(here)
        except (OSError, EOFError):
            self.kill()
            by_hand = " ".join([*command[:-1], "0"])
            raise RunError(
                f"the process that decodes photos does not start; `{by_hand}` says why"
            ) from None
        self.ready = True

    def ask(
        self, path: str, allowed: int, data: bytes | None = None
    ) -> tuple[int, np.ndarray | None]:
        """Ask for the pixels of a file, or of the one before; see `rasters.serve`.

        Returns:
            The bytes of memory that it takes and no pixels, or pixels uint8 (H, W, 3).
        """
        with self._exchange(path), ExitStack() as files:
            file = None
            if data is not None:
                file = os.memfd_create("photo")
                files.callback(os.close, file)
                with open(file, "wb", closefd=False) as stream:
                    stream.write(data)
            rasters.send(self._socket, {"allowed": allowed}, file)
            answer, handle = rasters.receive(self._socket)
            if handle is not None:
                files.callback(os.close, handle)
                shared = mmap.mmap(handle, 0)
        if "reason" in answer:
            raise ImageError(path, answer["reason"])
        if handle is None:
            return answer["memory"], None
        return 0, np.frombuffer(shared, np.uint8).reshape(answer["shape"])

    def kill(self) -> None:
        self._stopped = self._stopped or self._process.returncode is None
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def disown(self) -> None:
        self._process.returncode = 0  # else it would be waited for
        self._socket.close()

    @contextmanager
    def _exchange(self, path: str) -> Iterator[None]:
        """Talk to the process; it is of no use any more when that is cut short."""
        self.ready = False
        try:
            yield
        except TimeoutError:
            raise ImageError(path, rasters.OVERTIME) from None
        except (ConnectionError, EOFError):
            raise ImageError(path, self._cause()) from None
        except OSError:  # of this process, such as a limit on its files, and not of the photo
            self.kill()
            raise
        self.ready = True

    def _cause(self) -> str:
        """Say why the worker died."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # it lives and does not talk
            self.kill()
            return rasters.OVERTIME
        if self._stopped:
            return "not decoded, since the work was stopped"
        if code == -signal.SIGPROF:
            return rasters.OVERTIME
        if code == -signal.SIGKILL or code > 0:
            return rasters.OVERSIZE
        return f"corrupt: the decoder crashed ({signal.Signals(-code).name})"


def _free_memory() -> int:
    """Count the bytes that this process could still take: of the machine, and of its cgroup."""
    free = [1 << 62]
    with suppress(OSError, AttributeError):
        known = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        free.append(1024 * int(known[1]))  # type: ignore[index]
    root, group = Path("/sys/fs/cgroup"), ""
    with suppress(OSError, AttributeError):
        own = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        group = own[1]  # type: ignore[index]
    above = [root / group, *(root / group).parents]
    for folder, limit, held in (
        *((folder, "memory.max", "anon") for folder in above),
        (root / "memory", "memory.limit_in_bytes", "total_rss"),  # of version 1
    ):
        with suppress(OSError, AttributeError, ValueError):  # none, or "max"
            most = int((folder / limit).read_text())
            known = re.search(rf"^{held} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            free.append(max(0, most - int(known[1])))  # type: ignore[index]
    return min(free)


def _forked() -> None:
    global _pool
    _pool.disown()
    _pool = _Pool()


_pool = _Pool()
atexit.register(stop)
os.register_at_fork(after_in_child=_forked)
