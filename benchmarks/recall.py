"""Exact recall on 5,000 images x 25,000 captions x 512, over one blocked matmul and its top-10.

The baseline is what any implementation has to do at least: score blocks of 500 images against
all captions, take the ten best captions of each image, and keep the ten best images of each
caption over the blocks so far. It neither treats ties nor looks at which candidate is true.
Both run in one process on one thread, in turn; the figures are medians of CPU time.

    python -m benchmarks.recall
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.timing import medians, report
from crosstill.evaluate.recall import retrieval

IMAGES, CAPTIONS_EACH, WIDTH = 5000, 5, 512
ROWS = 500  # images in a block of the baseline
REPETITIONS = 5
THREADS = 1


def baseline(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The ten best captions of every image (I, 10) and best images of every caption (10, T)."""
    captions: list[Tensor] = []
    scores, images = image.new_empty(0, len(text)), torch.empty(0, len(text), dtype=torch.int64)
    for start in range(0, len(image), ROWS):
        block = image[start : start + ROWS] @ text.T
        captions.append(block.topk(10, dim=1).indices)
        best = block.topk(10, dim=0)
        scores, found = torch.cat([scores, best.values]), torch.cat([images, best.indices + start])
        scores, order = scores.topk(10, dim=0)
        images = found.gather(0, order)
    return torch.cat(captions), images


def products(image: Tensor, text: Tensor) -> None:
    """The scores alone, block by block, as the baseline makes them."""
    for start in range(0, len(image), ROWS):
        _ = image[start : start + ROWS] @ text.T


def main() -> dict[str, float]:
    """Measure, print one line and the figures as JSON, and return them."""
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=1)
    owner = torch.arange(IMAGES).repeat_interleave(CAPTIONS_EACH)
    noise = torch.randn(len(owner), WIDTH, generator=generator) / WIDTH**0.5
    text = normalize(image[owner] + 3 * noise, dim=1)
    works = {
        "recall": lambda: retrieval(image, text, owner),
        "baseline": lambda: baseline(image, text),
        "matmul": lambda: products(image, text),
    }
    result = medians(works, REPETITIONS)
    result["ratio"] = result["recall"] / result["baseline"]
    return report("recall", result, "at most 1.5 of matmul and top-10")


if __name__ == "__main__":
    main()
