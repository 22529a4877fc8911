"""A 640 x 480 JPEG to 224 x 224 RGB, against Pillow's decode, convert and bicubic resize.

python -m benchmarks.decode
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import medians, report
from crosstill import images

PHOTOS, REPETITIONS = 40, 15


def photo(seed: int) -> bytes:
    """A JPEG with the smooth areas, edges and grain of a photo."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
    grainy = np.clip(smooth + random.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=90)
    return file.getvalue()


def with_pillow(data: bytes) -> np.ndarray:
    """What a dataset class usually does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))


def main() -> dict[str, float]:
    """Measure, print one line, and return the figures."""
    torch.set_num_threads(1)
    photos = [photo(seed) for seed in range(PHOTOS)]
    wanted = images.Preprocess(size=(224, 224))
    works = {
        "crosstill": lambda: [images.load(data, "", wanted) for data in photos],
        "pillow": lambda: [with_pillow(data) for data in photos],
    }
    found = {name: seconds / PHOTOS for name, seconds in medians(works, REPETITIONS).items()}
    found["ratio"] = found["pillow"] / found["crosstill"]
    return report("decode", found, "at least 2.5 times Pillow")


if __name__ == "__main__":
    main()
