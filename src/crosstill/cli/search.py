"""`crosstill search`: the photos of an index that fit words or a photo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosstill.cli import common
from crosstill.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    import numpy as np

    from crosstill.search import Hit, Searcher

Query = Annotated[str | None, typer.Argument(help="Words to search by.")]
Image = Annotated[
    Path | None, typer.Option(help="A photo to search by; with QUERY, both count alike.")
]
Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="Leave out photos that score less; `auto`: what half the captions of other "
        "images reach in this index.",
    ),
]
Bundle = Annotated[Path | None, typer.Option(help="Use this bundle, not the index's own copy.")]


def command(
    index: Annotated[Path, typer.Argument(help="What `crosstill index` made.")],
    query: Query = None,
    top: Annotated[int, typer.Option(help="How many photos at most, 1 to 1000.")] = 10,
    image: Image = None,
    threshold: Threshold = None,
    bundle: Bundle = None,
    as_json: common.AsJson = False,
) -> None:
    """Find the photos of INDEX that fit QUERY, or a photo, best first.

    Scores are cosines. Without a threshold there are always hits, however little they fit.
    """
    if query is None and image is None:
        raise ConfigError("nothing to search for; give words, or --image")
    if query is not None and not query.strip():
        raise ConfigError("the query is empty; give words, or leave it out and give --image")
    if threshold == "auto" and image is not None:
        raise ConfigError("--threshold auto: is calibrated for words alone; give a score")
    from crosstill.search import MAX_TOP, Searcher

    if not 1 <= top <= MAX_TOP:
        raise ConfigError(f"--top {top}: give a number from 1 to {MAX_TOP}")
    searcher = Searcher.open(index, bundle)
    least = _threshold(searcher, threshold)
    hits = searcher.find(_vector(searcher, query, image)[None], top, least)[0]
    notes = searcher.notes(query or "")
    searcher.close()
    if as_json:
        results = [vars(hit) for hit in hits]
        common.dump({"threshold": least, "notes": notes, "results": results})
    else:
        for line in notes:
            common.note(f"note: {line}")
        common.say(_table(hits, least))


def _threshold(searcher: Searcher, given: str | None) -> float | None:
    if given is None:
        return None
    if given == "auto":
        return searcher.threshold()
    try:
        score = float(given)
    except ValueError:
        score = float("nan")
    if not -1 <= score <= 1:
        raise ConfigError(f"--threshold {given}: give a score from -1 to 1, or auto")
    return score


def _vector(searcher: Searcher, query: str | None, image: Path | None) -> np.ndarray:
    """Encode the query as one unit vector (D,)."""
    from crosstill.search import combine
    from crosstill.search.scan import read_photo

    vectors = [] if query is None else [searcher.encode_texts([query])[0]]
    if image is not None:
        if not image.exists():
            raise DataError(f"--image {image}: no such file; give a photo")
        vectors.append(searcher.encode_image(read_photo(Path(), str(image)), str(image)))
    return vectors[0] if len(vectors) == 1 else combine(*vectors)


def _table(hits: list[Hit], threshold: float | None) -> str:
    if not hits and threshold is not None:
        return f"nothing relevant: no photo scores {threshold:.3f} or more"
    return "\n".join(["score  photo", *(f"{h.score:.3f}  {printable(h.path)}" for h in hits)])
