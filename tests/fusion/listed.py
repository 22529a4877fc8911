"""Small fusion models and score caches that the tests of list training share."""

from pathlib import Path

from crosstill.fusion.meter import Meter
from crosstill.students.student_config import FusionConfig
from crosstill.train import TrainConfig

SHAPE = {"layers": 2, "width": 16, "heads": 2, "mlp": 16, "dropout": 0.0}
FAST = {
    "recipe": "info_nce",
    "losses": {"info_nce": {"hardest": 3}},
    "balance": {"name": "fixed"},
    "epochs": 2,
    "batch_size": 8,
    "steps_per_epoch": 4,
    "lr": 1e-3,
    "schedule": "constant",
    "log_every": 1,
}


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{**FAST, **changes})


def meter_config(towers: Path, **shape) -> FusionConfig:
    return FusionConfig(fusion="meter", towers=str(towers), shape={**SHAPE, **shape}, name="meter")


def parameters(model: Meter, start: str) -> list:
    return [p for name, p in model.named_parameters() if name.startswith(start)]
