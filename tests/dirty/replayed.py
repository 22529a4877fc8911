"""A cache by a teacher that keeps the pixels it was shown: scenes, folder of it, views, file."""

import sys
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent))

from crosstill import data  # noqa: E402
from crosstill.cache import build  # noqa: E402
from crosstill.images import Preprocess  # noqa: E402
from support import SmallTeacher  # noqa: E402


class Watching(SmallTeacher):
    """Keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = Preprocess(size=(24, 20))
        self.shown: list[torch.Tensor] = []

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.shown.append(pixels.clone())
        return super().embed_images(pixels)


def main(scenes: str, folder: str, views: str, kept: str) -> None:
    teacher = Watching()
    build(teacher, data.open(f"scenes:{scenes}:8"), folder, views=int(views), seed=5)
    np.save(kept, torch.cat(teacher.shown).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
