import pytest
import torch

from crosstill import balance
from crosstill.errors import ConfigError


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_without_gradients_all_weights_are_one():
    rule = balance.build("gradnorm", ("a", "b"))
    assert {k: v.item() for k, v in rule.weights(scalars(a=3.0, b=5.0)).items()} == {"a": 1, "b": 1}


def test_first_step_by_hand():
    # r = 1 for both; norms 3 and 1 become 1.5 and 0.5, their mean is 1: a falls by 0.1 * 1.5,
    # b rises by 0.1 * 0.5; 0.85 and 1.05 sum to 1.9 and are stretched to 2
    rule = balance.build("gradnorm", ("a", "b"), lr=0.1)
    rule.watch(scalars(a=3.0, b=1.0))
    weights = rule.weights(scalars(a=10.0, b=0.1))
    assert weights["a"].item() == pytest.approx(2 * 0.85 / 1.9, abs=1e-12)
    assert weights["b"].item() == pytest.approx(2 * 1.05 / 1.9, abs=1e-12)


def test_the_loss_that_falls_slowly_gains():
    # equal gradients; a has halved and b has not: r = (2/3, 4/3), so b may pull harder
    rule = balance.build("gradnorm", ("a", "b"), lr=0.1, alpha=1.0)
    for a in (1.0, 0.5):
        rule.watch(scalars(a=1.0, b=1.0))
        weights = rule.weights(scalars(a=a, b=1.0))
    assert weights["b"].item() == pytest.approx(1.1, abs=1e-12)
    assert weights["a"].item() == pytest.approx(0.9, abs=1e-12)


def test_pulls_become_equal():
    rule = balance.build("gradnorm", ("a", "b", "c"), alpha=0.0, lr=0.01)
    norms = {"a": 8.0, "b": 2.0, "c": 1.0}
    for _ in range(1000):
        rule.watch(scalars(**norms))
        weights = rule.weights(scalars(a=1.0, b=1.0, c=1.0))
    pulls = torch.stack([weights[k] * norms[k] for k in norms])
    assert sum(w.item() for w in weights.values()) == pytest.approx(3)
    assert pulls.max() / pulls.min() < 1.2


@pytest.mark.parametrize("option", [{"alpha": -1.0}, {"lr": 0.0}])
def test_refusals(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        balance.build("gradnorm", ("a", "b"), **option)
