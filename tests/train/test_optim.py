import pytest

from crosstill.train import TrainConfig
from crosstill.train.step import lr_at


def test_the_papers_step_schedule():
    config = TrainConfig()
    assert lr_at(0, 100, config) == 1e-4
    assert lr_at(999, 100, config) == 1e-4
    assert lr_at(1000, 100, config) == pytest.approx(1e-5)
    assert lr_at(1999, 100, config) == pytest.approx(1e-5)


def test_cosine_with_warm_up():
    config = TrainConfig(schedule="cosine", warmup_steps=10, epochs=2)
    assert lr_at(0, 55, config) == pytest.approx(1e-5)
    assert lr_at(9, 55, config) == pytest.approx(1e-4)
    assert lr_at(10, 55, config) == pytest.approx(1e-4)
    assert lr_at(60, 55, config) == pytest.approx(5e-5)
    assert lr_at(110, 55, config) == pytest.approx(0, abs=1e-12)


def test_constant():
    assert lr_at(12345, 10, TrainConfig(schedule="constant", lr=0.5)) == 0.5
