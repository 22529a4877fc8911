from math import exp, log

import pytest
import torch

from crosstill import balance

LOSSES = {"a": torch.tensor(3.0).double(), "b": torch.tensor(0.5).double()}


def test_weights_and_penalty_by_hand():
    rule = balance.build("uncertainty", ["a", "b"])
    assert rule.weights(LOSSES) == {"a": 0.5, "b": 0.5}
    assert rule.penalty() == 0
    with torch.no_grad():
        rule.log_variance.copy_(torch.tensor([log(4), -1], dtype=torch.float64))
    weights = rule.weights(LOSSES)
    assert weights["a"].item() == pytest.approx(1 / 8, abs=1e-9)
    assert weights["b"].item() == pytest.approx(exp(1) / 2, abs=1e-9)
    assert rule.penalty().item() == pytest.approx((log(4) - 1) / 2, abs=1e-9)


def test_the_best_variance_is_the_loss():
    rule = balance.build("uncertainty", ["a", "b"])
    with torch.no_grad():
        rule.log_variance.copy_(torch.tensor([log(3), log(0.5)], dtype=torch.float64))
    weights = rule.weights(LOSSES)
    (sum(weights[k] * LOSSES[k] for k in LOSSES) + rule.penalty()).backward()
    torch.testing.assert_close(
        rule.log_variance.grad, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(("far", "bound"), [(-1e6, -20), (1e6, 20)])
def test_far_variances_stop_moving(far, bound):
    rule = balance.build("uncertainty", ["a", "b"])
    with torch.no_grad():
        rule.log_variance.fill_(far)
    weights = rule.weights(LOSSES)
    assert weights["a"].item() == pytest.approx(exp(-bound) / 2)
    assert rule.penalty().item() == bound
    (weights["a"] * LOSSES["a"] + rule.penalty()).backward()
    assert not rule.log_variance.grad.any()
