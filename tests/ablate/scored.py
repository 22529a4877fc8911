"""A fusion teacher on disk and its scores, so small that a whole grid takes seconds."""

from pathlib import Path

import torch

from crosstill import data, fusion, teachers
from crosstill.fusion.scores import ScoreCache
from evaluate.judges import small_meter, texts_of

# a grid of candidate lists whose runs take a fraction of a second
LISTS = (
    "epochs=1",
    "steps_per_epoch=3",
    "batch_size=8",
    "lr=3e-3",
    "log_every=1",
    "losses.dcd.hardest=3",
)


def score_cache(home: Path, count: int) -> ScoreCache:
    """Scenes under a METER of four layers, whose folder is `home / "meter"`."""
    pairs = data.open(f"scenes:{count}")
    small_meter(home / "meter", texts_of(pairs), layers=4)
    teacher = teachers.load(home / "meter")
    with torch.no_grad():  # as it starts, it scores all pairs alike, and is as unsure of each
        for weight in teacher.fusion.parameters():
            weight.mul_(4)
    teacher.save(home / "meter")
    teacher = teachers.load(home / "meter")
    return fusion.build_scores(teacher, pairs, home / "scores", false=6, false_images=3)
