"""The load on the server: gates bound it, batches share it, counters report it to Prometheus."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from crosstill.errors import RunError
from crosstill.search.searcher import Searcher

log = logging.getLogger(__name__)

TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)

Q = TypeVar("Q")
A = TypeVar("A")
_Job = tuple[asyncio.AbstractEventLoop, dict[asyncio.Future[Any], Any]]


class Overloaded(RunError):
    """The server has as much to do as it may hold; the asker may try again soon."""


class WorkerError(RunError):
    """A worker failed by something that is no ordinary error, such as a panic in Rust."""


class Gate:
    """Admits so many at once, the waiting ones included."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextmanager
    def enter(self, amount: int = 1) -> Iterator[None]:
        """Hold room while the block runs.

        Raises:
            Overloaded: there is no room.
        """
        self.take(amount)
        try:
            yield
        finally:
            self.inside -= amount

    def take(self, amount: int = 1) -> None:
        """Take room, which the caller gives back itself."""
        if self.inside + amount > self.most:
            raise Overloaded("too many requests at once; try again soon")
        self.inside += amount


class Batcher(Generic[Q, A]):
    """Computes queries in batches: a batch is what has queued while all workers were at work.

    A query that finds a worker idle starts at once. One whose asker has gone is dropped.
    It has no bound of its own: put a `Gate` before it.

    Args:
        compute: queries → as many answers, in a thread. An answer that is an exception is for
            its asker alone; what `compute` raises, all of them get.
        workers: threads, each with a batch of its own.
        most: queries of a batch.
        on_batch: is called with the size of every batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Q]], Sequence[A | Exception]],
        workers: int,
        most: int,
        on_batch: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._compute, self._idle, self._most, self._on_batch = compute, workers, most, on_batch
        self._waiting: dict[asyncio.Future[A], Q] = {}
        # Threads of its own: a hop through an executor and its futures takes twice as long.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._workers = workers
        for _ in range(workers):
            Thread(target=self._work, daemon=True).start()

    async def __call__(self, query: Q) -> A:
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = query
        self._begin()
        try:
            return await answer
        finally:
            self._waiting.pop(answer, None)

    def close(self) -> None:
        """End the threads after the batches they have begun, and cancel queries that wait.

        Nobody waits for them, not even the process when it ends: they are daemons.
        """
        for answer in [*self._waiting]:
            answer.cancel()
        self._waiting.clear()
        for _ in range(self._workers):
            self._jobs.put(None)

    def _begin(self) -> None:
        while self._idle and self._waiting:
            batch = {answer: self._waiting[answer] for answer in islice(self._waiting, self._most)}
            for answer in batch:
                del self._waiting[answer]
            self._idle -= 1
            self._on_batch(len(batch))
            self._jobs.put((asyncio.get_running_loop(), batch))

    def _work(self) -> None:
        """Compute batches until the batcher is closed."""
        while (job := self._jobs.get()) is not None:
            loop, batch = job
            answers: Sequence[Any]
            try:
                answers = self._compute([*batch.values()])
            except Exception as error:
                answers = [error] * len(batch)
            except BaseException as error:  # the next batch finds this thread as it was
                log.exception("a worker failed")
                answers = [WorkerError(f"a worker failed: {type(error).__name__}")] * len(batch)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._give, [*batch], answers)

    def _give(self, batch: Sequence[asyncio.Future[A]], values: Sequence[A | Exception]) -> None:
        self._idle += 1
        self._begin()
        for answer, value in zip(batch, values, strict=True):
            if answer.done():
                continue
            if isinstance(value, Exception):
                answer.set_exception(value)
            else:
                answer.set_result(value)


def jobs(workers: int) -> Batcher[Callable[[], Any], Any]:
    """Make threads that call functions, one at a time each."""
    return Batcher(lambda batch: [job() for job in batch], workers, most=1)


class Metrics:
    """Counters in a registry of their own, so that two servers in a process do not add up."""

    def __init__(self, searcher: Searcher) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "crosstill_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "crosstill_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "crosstill_rejected",
            "Requests and connections turned away by a limit.",
            ["limit"],
            registry=registry,
        )
        self.received = Counter(
            "crosstill_received_bytes", "Bytes read from connections.", registry=registry
        )
        self.connections = Gauge("crosstill_connections", "Open connections.", registry=registry)
        self.batches = Histogram(
            "crosstill_batch_size",
            "Searches computed together.",
            buckets=_SIZES,
            registry=registry,
        )
        self._watch("crosstill_index_photos", "Photos in the index.", lambda: len(searcher))
        self._watch("crosstill_index_generation", "Generation served.", lambda: searcher.generation)

    def watch_queue(self, gate: Gate) -> Gate:
        """Report how many searches are inside."""
        self._watch("crosstill_queue", "Searches waiting or under way.", lambda: gate.inside)
        return gate

    def text(self) -> bytes:
        """Return all counters, for a scrape."""
        return generate_latest(self._registry)

    def _watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(name, meaning, registry=self._registry).set_function(value)
