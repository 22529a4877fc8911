"""Building a cache, over the bare forward passes of its teacher on pixels already decoded.

python -m benchmarks.caching
"""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.models import teacher
from benchmarks.timing import medians, report
from crosstill import cache, data, images, teachers

SCENES, REPETITIONS, BATCH = 128, 3, 64


def main() -> dict[str, float]:
    """Measure, print one line, and return the figures."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data.scenes.write(folder / "scenes", SCENES)  # files, as a user's photos are
        pairs = data.open(folder / "scenes/dataset.json")
        texts = [text for example in pairs.examples for text in example.captions]
        words = sorted({word.strip(".,").lower() for text in texts for word in text.split()})
        model = teachers.load(teacher(folder / "teacher", words))
        pixels = [images.load(pairs.read(e), e.path, model.preprocess) for e in pairs.examples]
        batches = [torch.stack(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
        ordered = sorted(texts, key=len)

        def bare() -> None:
            for batch in batches:
                model.embed_images(batch)
            for start in range(0, len(ordered), BATCH):
                model.embed_texts(ordered[start : start + BATCH])

        fresh = count()
        works = {
            "build": lambda: cache.build(model, pairs, folder / f"cache-{next(fresh)}"),
            "forward": bare,
        }
        found = medians(works, REPETITIONS)
    found["ratio"] = found["build"] / found["forward"]
    return report("caching", found, "at most 1.10 of the forward")


if __name__ == "__main__":
    main()
