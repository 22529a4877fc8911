"""A DSMD training step, over the bare student's forward, backward and optimizer.

The whole step makes its batch, encodes, takes four losses with a queue of 8,192, balances
them, goes back, updates student and queue. The bare step has its batch ready.

    python -m benchmarks.step
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.models import STUDENT
from benchmarks.timing import medians, report
from crosstill import cache, data, students
from crosstill.images import Preprocess
from crosstill.students.student_config import StudentConfig
from crosstill.train import TrainConfig, step
from crosstill.train.batches import Batch, Stream
from crosstill.train.distributed import Group
from crosstill.train.task import Task, open_task

SCENES, REPETITIONS, WIDTH = 200, 9, 512


class RandomTeacher:
    """Unit vectors at no cost: only their shape matters here."""

    name, dim, licence, source = "random", WIDTH, None, None
    modalities = frozenset({"image", "text"})
    preprocess = Preprocess(size=(8, 8))

    def identity(self) -> dict[str, str]:
        return {"weights": "random"}

    def parameter_count(self) -> int:
        return 0

    def embed_images(self, pixels: Tensor) -> Tensor:
        return normalize(torch.randn(len(pixels), WIDTH), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return normalize(torch.randn(len(texts), WIDTH), dim=1)

    def count_truncated(self, texts: Sequence[str]) -> int:
        return 0


def bare_step(student: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Nothing but the student."""
    optimizer.zero_grad(set_to_none=True)
    features = student(batch.images, batch.texts)
    (features.image.sum() + features.text.sum()).backward()
    optimizer.step()


def whole_step(task: Task, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Losses, weights and queue too."""
    optimizer.zero_grad(set_to_none=True)
    task.backward(batch)
    optimizer.step()
    task.after(batch)


def main() -> dict[str, float]:
    """Measure, print one line, and return the figures."""
    torch.set_num_threads(1)
    config = TrainConfig()
    with tempfile.TemporaryDirectory() as place:
        told = cache.build(RandomTeacher(), data.open(f"scenes:{SCENES}"), Path(place) / "cache")
        shape = StudentConfig.model_validate(STUDENT)
        student, bare = (students.build(shape, WIDTH, told.texts) for _ in range(2))
        stream = Stream(told, told.split("train"), student, config, Group())
        task = open_task(told, config)
        task.fit(student)
        task.start(student)
        optimizer = step.build_optimizer((student, task.losses), task.balance, config)
        plain = torch.optim.AdamW(bare.parameters(), lr=config.lr)
        ready = stream.batch(0, 0)
        numbers: Iterator[int] = count()
        works = {
            "step": lambda: whole_step(task, optimizer, stream.batch(0, next(numbers))),
            "bare": lambda: bare_step(bare, plain, ready),
        }
        found = medians(works, REPETITIONS)
    found["ratio"] = found["step"] / found["bare"]
    return report("step", found, "at most 1.10 of the bare student")


if __name__ == "__main__":
    main()
