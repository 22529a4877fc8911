"""Ten of many vectors: a flat index, 8-bit codes and a graph of such, on one thread.

The queries lie apart from the vectors, as captions do from photos: a quantised index answers
queries of its own kind better than such. Vectors and queries are made up, or real ones given as
float32 files (N, D); real vectors are repeated with a little noise until there are enough. Each
index is asked one query at a time, and sixteen together; `bare` is FAISS alone on the vectors of
the flat one.

    python -m benchmarks.vectors [--count 200000] [--vectors IMAGES.npy --queries TEXTS.npy]

Prints for each index how long it took to build, what it takes on disk and in memory, how long the
middle query took, and how many of the ten it finds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import faiss
import numpy as np

from crosstill.search.memory_vectors import MemoryVectors
from crosstill.search.vector_index import KINDS, estimate_bytes

COUNT, DIM, FACTORS = 20_000, 512, 64
QUERIES, TOP, STEP = 300, 10, 5_000
TOGETHER = 16
NOISE = 0.3  # length of what is added to a repeated vector

Search = Callable[[np.ndarray, int], object]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length one, in float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def made_up(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Photos (count, D), and captions (QUERIES, D) that are nearest to the first of them.

    Both follow some factors of falling weight, captions loosely, and each kind has a direction
    of its own.
    """
    random = np.random.default_rng(0)
    weights = np.arange(1, FACTORS + 1) ** -0.5
    factors = random.standard_normal((count, FACTORS)) * weights
    loose = factors[:QUERIES] + 0.6 * random.standard_normal((QUERIES, FACTORS)) * weights
    space = random.standard_normal((FACTORS, DIM)) / DIM**0.5
    photo, caption = random.standard_normal((2, DIM)) / DIM**0.5
    rest = random.standard_normal((count, DIM)) * (0.5 / DIM**0.5)
    return unit(factors @ space + photo + rest), unit(loose @ space + caption)


def repeated(vectors: np.ndarray, count: int) -> np.ndarray:
    """`count` rows: these vectors, then the same with noise."""
    random = np.random.default_rng(0)
    found = np.resize(vectors, (count, vectors.shape[1]))
    noise = random.standard_normal((max(0, count - len(vectors)), vectors.shape[1]), np.float32)
    found[len(vectors) :] += noise * (NOISE / vectors.shape[1] ** 0.5)
    return unit(found)


def build(vectors: np.ndarray, kind: str) -> tuple[MemoryVectors, dict[str, float]]:
    """An index of these vectors, and what it took."""
    index = MemoryVectors(vectors.shape[1], kind)
    start = time.process_time()
    for at in range(0, len(vectors), STEP):
        part = vectors[at : at + STEP]
        index.add(np.arange(at, at + len(part)), part)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as place:
        sizes = [(Path(place) / name).stat().st_size for name in index.save(Path(place))]
    memory = estimate_bytes(*vectors.shape, kind)
    return index, {
        "build": seconds,
        "disk": sum(sizes) / len(vectors),
        "memory": memory / len(vectors),
    }


def middle(
    searches: Mapping[str, Search], queries: np.ndarray, together: int = 1
) -> dict[str, float]:
    """The median time of one query in each, in seconds; they take turns, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for at in range(0, len(queries) - together + 1, together):
        for name, search in searches.items():
            start = time.perf_counter()
            search(queries[at : at + together], TOP)
            times[name].append((time.perf_counter() - start) / together)
    return {name: median(all_[len(all_) // 10 :]) for name, all_ in times.items()}


def measure(vectors: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Build all indexes and ask them: recall@10, and what each of them takes."""
    bare = faiss.IndexFlatIP(vectors.shape[1])
    bare.add(vectors)
    indexes, found = {}, {}
    for kind in KINDS:
        indexes[kind], figures = build(vectors, kind)
        found |= {f"{kind} {name}": value for name, value in figures.items()}
    searches: dict[str, Search] = {kind: index.search for kind, index in indexes.items()}
    searches["bare"] = bare.search
    for name, seconds in middle(searches, queries).items():
        found[f"{name} p50"] = seconds
    for name, seconds in middle(searches, queries, TOGETHER).items():
        found[f"{name} together"] = seconds
    answers = {kind: index.search(queries, TOP)[1] for kind, index in indexes.items()}
    for kind, ids in answers.items():
        pairs = zip(answers["flat"], ids, strict=True)
        found[f"{kind} recall"] = float(np.mean([len(set(a) & set(b)) / TOP for a, b in pairs]))
    return found


def main(arguments: Sequence[str] = ()) -> dict[str, float]:
    """Measure, print a line and what is behind it, and return the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vectors")
    parser.add_argument("--count", type=int, default=COUNT, help="how many vectors")
    parser.add_argument("--vectors", type=Path, help="real ones, a .npy file of float32 (N, D)")
    parser.add_argument("--queries", type=Path, help="queries of the same space, likewise")
    options = parser.parse_args(arguments)
    if (options.vectors is None) != (options.queries is None):
        parser.error("--vectors and --queries go together")
    faiss.omp_set_num_threads(1)
    if options.vectors:
        vectors = repeated(unit(np.load(options.vectors)), options.count)
        queries = unit(np.load(options.queries))
        queries = queries[:: max(1, len(queries) // QUERIES)][:QUERIES]
    else:
        vectors, queries = made_up(options.count)
    found = measure(vectors, queries)
    for kind in KINDS:
        print(
            f"  {kind}: build {found[f'{kind} build']:.1f} s, on disk {found[f'{kind} disk']:.0f} "
            f"and in memory {found[f'{kind} memory']:.0f} bytes a vector, "
            f"p50 {1000 * found[f'{kind} p50']:.2f} ms, of {TOGETHER} together "
            f"{1000 * found[f'{kind} together']:.2f} ms each, recall@{TOP} "
            f"{found[f'{kind} recall']:.4f}"
        )
    ratio = found["codes p50"] / found["bare p50"]
    print(
        f"{'vectors':8} {ratio:.3f}  (codes over bare FAISS flat among {len(vectors):,}, wanted at "
        f"most 0.6)  recall@{TOP} {found['codes recall']:.4f}, wanted at least 0.999",
        flush=True,
    )
    return found


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
