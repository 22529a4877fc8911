"""From a configuration to an untrained student."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crosstill.students import towers
from crosstill.students.config import StudentConfig
from crosstill.students.student import Student


def build(config: StudentConfig, captions: Sequence[str], seed: int) -> Student:
    """Read or start both towers and the heads; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image = towers.image_part(config.image)
        text = towers.text_part(config.text, captions)
        # Drawn anew, so that the heads do not depend on how the towers came about.
        torch.manual_seed(seed + 1)
        return Student(config, image, text)
