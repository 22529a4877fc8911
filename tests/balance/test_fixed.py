import torch

from crosstill import balance

LOSSES = {"a": torch.tensor(3.0), "b": torch.tensor(7.0)}


def test_all_are_one_by_default():
    assert balance.build("fixed", ["a", "b"]).weights(LOSSES) == {"a": 1, "b": 1}


def test_named_losses_get_their_weight():
    rule = balance.build("fixed", ["a", "b"], weights={"b": 0.25})
    assert rule.weights(LOSSES) == {"a": 1, "b": 0.25}
    assert rule.penalty() == 0
