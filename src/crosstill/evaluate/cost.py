"""What a model costs: parameters, the time of one image and of one caption, and of a whole set."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

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


@dataclass(frozen=True)
class Cost:
    """What a whole set takes, from decoded pixels and plain text to all I x T scores.

    Attributes:
        passes: I + T of a dual encoder, I x T of a fusion model, whose towers are in `seconds`.
        seconds: wall time on one thread.
        sample: the pairs that were timed, where `seconds` is extrapolated from them.
        faster: how many times quicker than the slowest model beside it.
        rough: whether `faster` rests on an extrapolation.
    """

    passes: int
    seconds: float
    sample: int | None = None
    faster: float = 1.0
    rough: bool = False

    @property
    def estimated(self) -> bool:
        """Whether the seconds are extrapolated."""
        return self.sample is not None

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "estimated": self.estimated}
        return {key: value for key, value in values.items() if value is not None}

    def cells(self) -> list[str]:
        """Format passes, seconds and how many times faster for a table."""
        mark, ratio = "≈" * self.estimated, "≈" * self.rough
        return [f"{self.passes:,}", mark + figure(self.seconds), ratio + figure(self.faster)]


def compared(costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Add to each cost how many times faster it is than the slowest."""
    slowest = max(costs.values(), key=lambda cost: cost.seconds)
    return {
        name: replace(
            cost,
            faster=slowest.seconds / cost.seconds,
            rough=cost is not slowest and (cost.estimated or slowest.estimated),
        )
        for name, cost in costs.items()
    }


def figure(value: float) -> str:
    """Format a number with as many digits as it is worth: 0.123, 12.3, 1,230."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Stopwatch:
    """Adds up the seconds of pieces of work, on a GPU to their end."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what the block takes."""
        _finish()
        start = time.perf_counter()
        try:
            yield
        finally:
            _finish()
            self.seconds += time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
                watch = Stopwatch()
                with watch.running():
                    job()
                times[key].append(1000 * watch.seconds)
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
