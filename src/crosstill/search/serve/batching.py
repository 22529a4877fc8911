"""Queries that arrive together are computed together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from crosstill.errors import RunError

Q = TypeVar("Q")
A = TypeVar("A")
_PATIENCE = 5.0  # seconds to wait for a batch when the server stops
_Job = tuple[asyncio.AbstractEventLoop, dict[asyncio.Future[Any], Any]]


class Overloaded(RunError):
    """The server has as much to do as it may hold; the asker may try again soon."""


class Gate:
    """So many at once, the waiting ones included."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextmanager
    def enter(self, amount: int = 1) -> Iterator[None]:
        """Be inside while the block runs.

        Raises:
            Overloaded: there is no room.
        """
        self.take(amount)
        try:
            yield
        finally:
            self.inside -= amount

    def take(self, amount: int = 1) -> None:
        """Enter; whoever calls this gives `amount` back itself."""
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
        told: is called with the size of every batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Q]], Sequence[A | Exception]],
        workers: int,
        most: int,
        told: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._compute, self._idle, self._most, self._told = compute, workers, most, told
        self._waiting: dict[asyncio.Future[A], Q] = {}
        # Threads of its own: a hop through an executor and its futures takes twice as long.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    async def __call__(self, query: Q) -> A:
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = query
        self._begin()
        try:
            return await answer
        finally:
            self._waiting.pop(answer, None)

    def close(self) -> None:
        """Let the threads end what they have begun; what waits never begins."""
        for answer in [*self._waiting]:
            answer.cancel()
        self._waiting.clear()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _begin(self) -> None:
        while self._idle and self._waiting:
            batch = {answer: self._waiting[answer] for answer in islice(self._waiting, self._most)}
            for answer in batch:
                del self._waiting[answer]
            self._idle -= 1
            self._told(len(batch))
            self._jobs.put((asyncio.get_running_loop(), batch))

    def _work(self) -> None:
        """What a thread does until it is closed."""
        while (job := self._jobs.get()) is not None:
            loop, batch = job
            found: Sequence[Any]
            try:
                found = self._compute([*batch.values()])
            except Exception as error:
                found = [error] * len(batch)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._give, [*batch], found)

    def _give(self, batch: Sequence[asyncio.Future[A]], found: Sequence[A | Exception]) -> None:
        self._idle += 1
        self._begin()
        for answer, value in zip(batch, found, strict=True):
            if answer.done():
                continue
            if isinstance(value, Exception):
                answer.set_exception(value)
            else:
                answer.set_result(value)
