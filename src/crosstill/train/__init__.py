"""Training: settings, loop, checkpoints, run folders, several processes."""

from crosstill.train.config import TrainConfig
from crosstill.train.folder import Run
from crosstill.train.loop import train

__all__ = ["Run", "TrainConfig", "train"]
