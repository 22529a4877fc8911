"""What a model costs: parameters, and the time of one image and of one caption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch

from crosstill.teachers.base import Teacher

CAPTION = "a brown dog runs after a red ball on the wet grass"


@dataclass(frozen=True)
class Efficiency:
    """Latency is the median of single items, on one thread, in milliseconds."""

    parameters: int
    image_ms: float
    caption_ms: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure(
    models: Mapping[str, Teacher], caption: str = CAPTION, repeats: int = 30
) -> dict[str, Efficiency]:
    """Time every model in turn, round after round, so that a noisy machine is noisy to all.

    Args:
        models: name → model; pixels are random, at the model's own size, already decoded.
        caption: what to encode, tokenization included.
        repeats: rounds; the first two are not counted.
    """
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in models.items():
        pixels = torch.randint(0, 256, (1, 3, *model.preprocess.size), dtype=torch.uint8)
        jobs[name, "image"] = partial(model.embed_images, pixels)
        jobs[name, "caption"] = partial(model.embed_texts, [caption])
    times: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    with one_thread():
        for _ in range(repeats + 2):
            for key, job in jobs.items():
                times[key].append(_milliseconds(job))
    return {
        name: Efficiency(
            model.parameter_count(),
            median(times[name, "image"][2:]),
            median(times[name, "caption"][2:]),
        )
        for name, model in models.items()
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _milliseconds(job: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
