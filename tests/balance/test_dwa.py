from math import exp

import pytest
import torch

from crosstill import balance


def epoch(rule, *rows):
    """One step for each row, then the end of the epoch; the weights of the last step."""
    for row in rows:
        weights = rule.weights(
            {t: torch.tensor(v).double() for t, v in zip("ab", row, strict=True)}
        )
    rule.end_epoch()
    return [float(weights[t]) for t in "ab"]


def test_rates_by_hand():
    rule = balance.build("dwa", "ab")
    assert epoch(rule, (4.0, 4.0)) == [1, 1]
    assert epoch(rule, (4.0, 2.0)) == [1, 1]
    # rates 1 and 1/2, T = 2
    expected = [2 * exp(r / 2) / (exp(0.5) + exp(0.25)) for r in (1, 0.5)]
    assert expected == pytest.approx([1.1243530018, 0.8756469982], abs=1e-9)
    assert epoch(rule, (9.0, 9.0)) == pytest.approx(expected, abs=1e-9)


def test_rates_are_of_the_means_of_epochs():
    rule = balance.build("dwa", "ab")
    epoch(rule, (1.0, 5.0), (7.0, 3.0))  # means 4, 4
    epoch(rule, (2.0, 1.0), (6.0, 3.0))  # means 4, 2
    expected = pytest.approx([1.1243530018, 0.8756469982], abs=1e-9)
    assert epoch(rule, (0.0, 100.0), (50.0, 0.0), (1.0, 1.0)) == expected


def test_equal_rates_weigh_the_same():
    rule = balance.build("dwa", "ab")
    for row in ((8.0, 2.0), (4.0, 1.0), (2.0, 0.5)):
        assert epoch(rule, row) == [1, 1]


@pytest.mark.parametrize("temperature", [0.05, 2.0, 50.0])
def test_weights_sum_to_the_number_of_losses(temperature):
    rule = balance.build("dwa", "ab", temperature=temperature)
    for row in ((8.0, 2.0), (1.0, 1.0), (5.0, 0.1), (5.0, 0.0), (5.0, 3.0)):
        assert sum(epoch(rule, row)) == pytest.approx(2, abs=1e-9)


def test_an_epoch_without_steps_does_not_count():
    rule = balance.build("dwa", "ab")
    epoch(rule, (4.0, 4.0))
    rule.end_epoch()
    assert epoch(rule, (4.0, 2.0)) == [1, 1]
    assert rule.epochs == 2
