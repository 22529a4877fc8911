"""Does a student's photo find the teacher's row of it? Recall of rows, photos alone.

    python -m benchmarks.agreement RUN --split val

For students of vectors of images alone, whose captions no teacher has read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from crosstill.cache import Cache, pixels
from crosstill.evaluate import recall
from crosstill.train import Run

CHUNK = 50


def agreement(run: Run, split: str) -> recall.Retrieval:
    """Each image of the split, as the best student sees it, among the teacher's rows of all."""
    cache = Cache(run.config["cache"]["folder"])
    rows, student = cache.split(split), run.best
    photos = pixels(cache, rows, student.preprocess)
    chunks = torch.arange(len(photos)).split(CHUNK)
    mine = torch.cat([student.embed_images(photos.take(chunk.numpy())) for chunk in chunks])
    return recall.retrieval(mine, cache.image_features(rows.images), torch.arange(len(mine)))


def main() -> None:
    """Print R@1, R@5 and R@10 of student's row → teacher's row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="val")
    given = parser.parse_args()
    found = agreement(Run(given.run), given.split).i2t
    told = ", ".join(f"R@{k} {getattr(found, f'r{k}'):.1f}" for k in (1, 5, 10))
    print(f"{given.run}: student's photo → teacher's row, {given.split}: {told}")


if __name__ == "__main__":
    main()
