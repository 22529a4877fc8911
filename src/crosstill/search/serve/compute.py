"""Several queries in one pass through the text tower and one search of the index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crosstill.errors import InputError
from crosstill.search.searcher import MAX_TOP, Hit, Searcher, combine


class NoSuchPhotoError(InputError):
    """An id that is not, or is no longer, in the index."""


@dataclass(frozen=True, eq=False)
class Query:
    """What is looked for: words, a photo, a photo of the index, or several of them added up.

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
    """What was found for a query, best first, and in which generation of the index.

    The notes say what of its words the model cannot use.
    """

    hits: list[Hit]
    generation: int
    notes: list[str]


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
    for top, asked in alike.items():
        found = searcher.find(np.stack([vector for _, vector in asked]), top)
        for (row, _), hits in zip(asked, found, strict=True):
            query = queries[row]
            notes = searcher.notes(query.words)
            answers[row] = Hits(_wanted(hits, query), searcher.generation, notes)
    return [found for found in answers if found is not None]


def _words(searcher: Searcher, queries: Sequence[Query]) -> list[np.ndarray | None]:
    """The vector of each query's words, None where it has none."""
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
