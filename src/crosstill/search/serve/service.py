"""Answer searches for the JSON routes and the page: words, a photo or a photo's id in, hits out.

Searches that wait at the same time share one pass through the text tower and one search of the
index: see `answer`.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np

from crosstill import decoding
from crosstill.errors import ConfigError, CorruptError, CrosstillError, InputError
from crosstill.search.searcher import MAX_TOP, Hit, Searcher, combine
from crosstill.search.serve.limits import Settings
from crosstill.search.serve.load import Batcher, Gate, Metrics, Overloaded, jobs

log = logging.getLogger(__name__)

AUTO = "auto"  # the threshold that the index was calibrated to, for queries of words alone

_TRIED = 100  # results of a search that tries whether the index can be read

Threshold = float | str | None


class NoSuchPhotoError(InputError):
    """An id that is not, or is no longer, in the index."""


@dataclass(frozen=True, eq=False)
class Query:
    """One query: words, a photo, a photo of the index, or several of them added up.

    Attributes:
        words: "" for none.
        photo: its vector, float32 (D,); None for none.
        like: id of a photo of the index, which is itself left out of the answer; "" for none.
        top: how many photos at most.
        threshold: least score; None sets no bound.
    """

    words: str
    photo: np.ndarray | None
    like: str
    top: int
    threshold: float | None


@dataclass(frozen=True)
class Hits:
    """The hits of one query, best first, and the generation of the index that was searched.

    The notes say what of its words the model cannot use.
    """

    hits: list[Hit]
    generation: int
    notes: list[str]


@dataclass(frozen=True)
class SearchResult:
    """The answer to a search.

    Attributes:
        query: the words that were asked for; "" where there were none.
        hits: best first.
        took: milliseconds from the question to the answer, waiting included.
        generation: of the index that was searched.
        threshold: the least score that was asked for; None where there was no bound.
        notes: sentences on what of the words the model cannot use.
    """

    query: str
    hits: list[Hit]
    took: float
    generation: int
    threshold: float | None
    notes: list[str]

    @property
    def nothing_relevant(self) -> bool:
        """Tell whether there was a bound that no photo reached."""
        return self.threshold is not None and not self.hits


class Service:
    """Searches an index for many askers at once, and turns away those it has no room for.

    Every method that searches raises `ConfigError` for an impossible question, and `Overloaded`
    while the server is starting or has too much to do. All run in one event loop.

    Attributes:
        ready: both towers are warm.
    """

    def __init__(self, searcher: Searcher, settings: Settings, metrics: Metrics) -> None:
        self.searcher, self.settings, self.metrics = searcher, settings, metrics
        self.ready = False
        self._gate = metrics.watch_queue(Gate(settings.queue))
        compute, on_batch = partial(answer, searcher), metrics.batches.observe
        self._answer = Batcher(compute, settings.workers, settings.batch, on_batch)
        self._encode = jobs(settings.photo_encoders)
        self._fault, self._damage = "", ""

    async def text(
        self, q: str, top: int | None = None, threshold: Threshold = None
    ) -> SearchResult:
        """Find photos that fit the words.

        Args:
            q: the words.
            top: how many at most; the settings' where None.
            threshold: least score, from -1 to 1, or "auto"; the settings' where None.
        """
        words = self._words(q)
        if not words:
            raise ConfigError("q: empty; say what the photo shows")
        bound = await self._bound(threshold, calibrated=True)
        with self._enter():
            return await self._search(Query(words, None, "", self._top(top), bound))

    async def photo(
        self, data: bytes, q: str = "", top: int | None = None, threshold: Threshold = None
    ) -> SearchResult:
        """Find photos like the one in these bytes, and that fit the words where there are some.

        Raises:
            ImageError: the bytes are no photo that can be read.
        """
        words, top = self._words(q), self._top(top)
        bound = await self._bound(threshold, calibrated=False)
        began = time.monotonic()
        with self._enter():
            vector = await self._encode(partial(self.searcher.encode_image, data, "photo"))
            return await self._search(Query(words, vector, "", top, bound), began)

    async def like(
        self, photo_id: str, q: str = "", top: int | None = None, threshold: Threshold = None
    ) -> SearchResult:
        """Find photos like one of the index, which is itself left out.

        Raises:
            NoSuchPhotoError: no photo of the index has that id.
        """
        if not photo_id:
            raise ConfigError("like: empty; give the id of a photo")
        bound = await self._bound(threshold, calibrated=False)
        with self._enter():
            query = Query(self._words(q), None, photo_id, self._top(top), bound)
            return await self._search(query)

    async def calibrated(self) -> float | None:
        """Return the score of the threshold "auto"; None for an index that is not calibrated."""
        try:
            return self.searcher.threshold()
        except ConfigError:
            return None

    async def fault(self) -> str:
        """Try a search, as a client would; return its error, "" where there is none.

        A server that is busy has no fault.
        """
        fault, patience = "", self.settings.timeout / 2  # the request itself has all of it
        try:
            with self._enter():
                async with asyncio.timeout(patience):
                    await self._answer(Query("a photo", None, "", _TRIED, None))
        except Overloaded as error:
            fault = "" if self.ready else str(error)
        except TimeoutError:
            fault = f"a search took more than {patience:g} s"
        except CrosstillError as error:
            fault = f"searches fail: {self._public(error)}"
        except Exception as error:
            fault = f"searches fail: {type(error).__name__}; the server's log says more"
            if fault != self._fault:
                log.exception("a search failed")
        if fault and self.ready and fault != self._fault:
            log.error("not ready: %s", fault)
        self._fault = fault
        return fault

    def damage(self, error: CorruptError) -> str:
        """Log an error once, and return the sentence that a client may read."""
        if str(error) != self._damage:
            log.error("%s", error)
        self._damage = str(error)
        return self._public(error)

    def close(self) -> None:
        """Shut down the threads: cancel queued searches, kill the decoding of photos."""
        self._answer.close()
        self._encode.close()
        decoding.stop()

    def _public(self, error: Exception) -> str:
        return str(error).replace(str(self.searcher.index), "INDEX")

    def _enter(self) -> AbstractContextManager[None]:
        if not self.ready:
            raise Overloaded("the models are still being loaded; try again soon")
        return self._gate.enter()

    async def _search(self, query: Query, began: float | None = None) -> SearchResult:
        began = time.monotonic() if began is None else began
        answer = await self._answer(query)
        took = 1000 * (time.monotonic() - began)
        return SearchResult(
            query.words, answer.hits, took, answer.generation, query.threshold, answer.notes
        )

    def _words(self, q: str) -> str:
        words = q.strip()
        if len(words) > self.settings.text:
            raise ConfigError(f"q: {len(words)} characters; at most {self.settings.text}")
        if "\0" in words:
            raise ConfigError("q: contains a null character; leave it out")
        return words

    def _top(self, top: int | None) -> int:
        top = self.settings.top if top is None else top
        if not 1 <= top <= MAX_TOP:
            raise ConfigError(f"top: {top} is not possible; 1 to {MAX_TOP}")
        return top

    async def _bound(self, threshold: Threshold, calibrated: bool) -> float | None:
        """Return the least score; "auto" is for words alone, as only these were calibrated."""
        if threshold is None and (calibrated or self.settings.threshold != AUTO):
            threshold = self.settings.threshold
        if threshold == AUTO:
            if not calibrated:
                raise ConfigError("threshold: auto is for words alone; give a number")
            threshold = await self.calibrated()
            if threshold is None:
                raise ConfigError("threshold: this index is not calibrated; give a number")
        if threshold is None:
            return None
        if isinstance(threshold, str) or not -1 <= threshold <= 1:
            raise ConfigError(f"threshold: {threshold} is not possible; -1 to 1, or {AUTO}")
        return threshold


def answer(searcher: Searcher, queries: Sequence[Query]) -> list[Hits | InputError]:
    """Answer all queries; an impossible one gets its error, the others their answers."""
    answers: list[Hits | InputError | None] = [None] * len(queries)
    alike: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)  # by how many are wanted
    for row, (query, words) in enumerate(zip(queries, _words(searcher, queries), strict=True)):
        try:
            vector = _vector(searcher, query, words)
        except InputError as error:
            answers[row] = error
        else:
            alike[min(query.top + bool(query.like), MAX_TOP)].append((row, vector))
    for top, rows_of_top in alike.items():
        hits_of_rows = searcher.find(np.stack([vector for _, vector in rows_of_top]), top)
        for (row, _), hits in zip(rows_of_top, hits_of_rows, strict=True):
            query = queries[row]
            notes = searcher.notes(query.words)
            answers[row] = Hits(_wanted(hits, query), searcher.generation, notes)
    return [hits for hits in answers if hits is not None]


def _words(searcher: Searcher, queries: Sequence[Query]) -> list[np.ndarray | None]:
    """Encode each query's words, None where it has none."""
    texts = [query.words for query in queries if query.words]
    rows = iter(searcher.encode_texts(texts) if texts else ())
    return [next(rows) if query.words else None for query in queries]


def _vector(searcher: Searcher, query: Query, words: np.ndarray | None) -> np.ndarray:
    parts = [vector for vector in (query.photo, words) if vector is not None]
    if query.like:
        like = searcher.vector(query.like)
        if like is None:
            raise NoSuchPhotoError("no photo of this index has that id")
        parts.append(like)
    return combine(*parts) if len(parts) > 1 else parts[0]


def _wanted(hits: list[Hit], query: Query) -> list[Hit]:
    least = -np.inf if query.threshold is None else query.threshold
    kept = [hit for hit in hits if hit.id != query.like and hit.score >= least]
    return kept[: query.top]
