"""Training: settings, loop, checkpoints, run folders, several processes."""

from crosstill.train.config import TrainConfig
from crosstill.train.folder import Learner, Run
from crosstill.train.loop import train

__all__ = ["Learner", "Run", "TrainConfig", "train"]
