import pytest
import torch
from torch import nn

from crosstill.train import TrainConfig
from crosstill.train.step import build_optimizer, lr_at


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


def test_linear_after_a_warm_up_of_a_tenth():
    config = TrainConfig(schedule="linear", warmup_share=0.1, epochs=2)
    assert lr_at(0, 50, config) == pytest.approx(1e-5)
    assert lr_at(9, 50, config) == pytest.approx(1e-4)
    assert lr_at(10, 50, config) == pytest.approx(1e-4)
    assert lr_at(55, 50, config) == pytest.approx(5e-5)
    assert lr_at(99, 50, config) == pytest.approx(1e-4 / 90)
    assert lr_at(100, 50, config) == 0
    assert lr_at(0, 50, config.changed(["warmup_steps=5"])) == pytest.approx(2e-5)


def layer_and_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))


def test_the_defaults_have_one_group():
    model = layer_and_norm()
    optimizer = build_optimizer([model], nn.Module(), TrainConfig(), model[0].parameters())
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
    assert (group["weight_decay"], group["betas"]) == (1e-4, (0.9, 0.999))
    assert "factor" not in group


def test_groups_by_decay_and_by_rate():
    model = layer_and_norm()
    config = TrainConfig(decay="matrices", fusion_lr=5.0, weight_decay=0.01, betas=(0.9, 0.98))
    optimizer = build_optimizer([model], nn.Module(), config, model[0].parameters())
    groups = [
        (group.get("factor", 1.0), group["weight_decay"], [tuple(p.shape) for p in group["params"]])
        for group in optimizer.param_groups
    ]
    assert groups == [(1.0, 0.0, [(3,), (3,)]), (5.0, 0.01, [(3, 2)]), (5.0, 0.0, [(3,)])]
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)
    torch.testing.assert_close(optimizer.defaults["lr"], config.lr)


def test_constant():
    assert lr_at(12345, 10, TrainConfig(schedule="constant", lr=0.5)) == 0.5
