"""CPU time and memory to read, cache and open loose texts, under a teacher that takes no time.

python -m benchmarks.loose_texts [LINES]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak
from crosstill import cache, data
from crosstill.images import Preprocess

LINES, WIDTH = 1_000_000, 64


class Constant:
    """A teacher that gives every photo and every text the same row."""

    name, source, licence, dim = "constant", None, None, WIDTH
    modalities = frozenset({"image", "text"})
    preprocess = Preprocess(size=(8, 8))

    def identity(self) -> dict[str, str]:
        return {"weights": "none"}

    def parameter_count(self) -> int:
        return 0

    def count_truncated(self, texts: Any) -> int:
        return 0

    def embed_texts(self, texts: Any) -> Tensor:
        return torch.eye(1, WIDTH).expand(len(texts), -1)

    embed_images = embed_texts


def lines(count: int) -> Iterator[str]:
    """Write sentences of made-up words, some 60 characters each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioulnrst", k=draw.randint(2, 9))) for _ in range(20_000)]
    for _ in range(count):
        yield " ".join(draw.choices(words, k=10)) + "\n"


def main(count: int = LINES) -> None:
    """Measure, and print a line for each step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "lines.txt").open("w") as file:
            file.writelines(lines(count))
        pairs = data.open("scenes:10")
        megabytes = (folder / "lines.txt").stat().st_size / 1e6
        print(f"{count:,} lines, {megabytes:.0f} MB; the process before: {peak() / 1e6:,.0f} MB")
        steps = {
            "build": lambda: cache.build(
                Constant(), pairs, folder / "cache", texts=[folder / "lines.txt"]
            ),
            "open": lambda: cache.open(folder / "cache"),
        }
        for name, work in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{name:6} {cpu:6.1f} s of CPU, {wall:6.1f} s, peak {peak() / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
