from math import exp

import pytest
import torch

from crosstill import balance

TASKS = ("cd", "fd", "sd", "hnd")
FIRST = (0.5, 1.9, 2.5, 1.0)
SECOND = (0.25, 1.9, 1.25, 1.0)  # ratios 1/2, 1, 1/2, 1
EXACT = {"eps": 1e-15}  # the published eps moves the values by 1e-8


def run(name, *rows, tasks=TASKS, **options):
    """The weighted losses and the weights after the last row, in the order of tasks."""
    rule = balance.build(name, tasks, **options)
    for row in rows:
        losses = {t: torch.tensor(v, dtype=torch.float64) for t, v in zip(tasks, row, strict=True)}
        weights = rule.weights(losses)
    return [float(weights[t] * losses[t]) for t in tasks], [float(weights[t]) for t in tasks]


def near(values):
    return pytest.approx(values, abs=1e-9)


def test_first_step_only_scales():
    # r = 1 for all: each share is 1, each weighted loss the largest loss
    weighted, weights = run("dsmd", FIRST, **EXACT)
    assert weighted == near([2.5] * 4)
    assert weights == near([5, 2.5 / 1.9, 1, 2.5])


def test_second_step_by_hand():
    slow, fast = exp(1), exp(0.5)
    share = [4 * r / (2 * slow + 2 * fast) for r in (fast, slow, fast, slow)]
    weighted, _ = run("dsmd", FIRST, SECOND, **EXACT)
    assert weighted == near([1.9 * s for s in share])


def test_total_is_the_sum_of_the_shares():
    weighted, _ = run("dsmd", FIRST, SECOND, total=10.0, **EXACT)
    assert sum(weighted) == near(10 * 1.9)


def test_published_eps_by_hand():
    # one loss: scale L / (L + eps)
    _, weights = run("dsmd", (2.0,), tasks=("a",), eps=0.5)
    assert weights == near([2 / 2.5])
    # r = L / (L before + eps): 1 / 1.5 and 1 / 2.5
    _, weights = run("dsmd", (1.0, 2.0), (1.0, 1.0), tasks=("a", "b"), eps=0.5)
    a, b = exp(1 / 1.5), exp(1 / 2.5)
    assert weights == near([2 * a / (a + b) / 1.5, 2 * b / (a + b) / 1.5])


def test_temperature_decides_in_dsmd_and_not_in_dsmd_scaled():
    cold, warm = (run("dsmd", FIRST, SECOND, temperature=t)[0] for t in (0.05, 1.0))
    assert max(abs(a - b) for a, b in zip(cold, warm, strict=True)) > 0.5
    cold, warm = (run("dsmd_scaled", FIRST, SECOND, temperature=t)[0] for t in (0.05, 1.0))
    assert cold == pytest.approx(warm, abs=1e-6)
    cold, warm = (run("dsmd_scaled", FIRST, SECOND, temperature=t, **EXACT)[0] for t in (0.05, 1))
    assert cold == near(warm)


def test_released_code_leaves_the_first_step_as_it_is():
    assert run("dsmd_scaled", FIRST)[1] == [1.0] * 4


@pytest.mark.parametrize("rows", [(SECOND, FIRST), (FIRST, FIRST), (FIRST, SECOND, FIRST)])
def test_released_code_makes_all_weighted_losses_equal(rows):
    # k / n max L = 10 / 4 * 2.5, at any step but the first
    assert run("dsmd_scaled", *rows, **EXACT)[0] == near([6.25] * 4)


def test_smoothing_is_a_moving_average_of_the_ratio_only():
    # s: 4, then .5 * 4 + .5 * 2 = 3, r = 3/4; the other stays: r = 1
    _, weights = run("dsmd", (4.0, 4.0), (2.0, 4.0), tasks=("a", "b"), smoothing=0.5, **EXACT)
    a, b = exp(0.75), exp(1)
    assert weights == near([2 * a / (a + b) * 2, 2 * b / (a + b)])
    # s: 3, then .5 * 3 + .5 * 1 = 2, r = 2/3
    rows = (4.0, 4.0), (2.0, 4.0), (1.0, 4.0)
    _, weights = run("dsmd", *rows, tasks=("a", "b"), smoothing=0.5, **EXACT)
    a = exp(2 / 3)
    assert weights == near([2 * a / (a + b) * 4, 2 * b / (a + b)])


def test_negative_losses_count_by_their_magnitude():
    assert run("dsmd", (-2.0, 1.0), tasks=("a", "b"), **EXACT)[1] == near([1, 2])
