"""Rules that every balancer obeys; a new file in `balance/` is held to them with no edit here."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crosstill import balance
from crosstill.errors import ConfigError

TASKS = ("cd", "fd", "sd", "hnd")
WILD = st.one_of(
    st.just(0.0),
    st.floats(-10, 10, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
ROWS = st.lists(st.tuples(*[WILD] * len(TASKS)), min_size=1, max_size=4)
SOME = [(4.0, 0.5, 0.9, 30.0), (3.0, 0.4, 0.9, 20.0), (2.0, 0.4, 0.8, 25.0), (2.0, 0.3, 0.5, 9.0)]

pytestmark = pytest.mark.parametrize("name", balance.known())


def losses(row, dtype=torch.float64) -> dict[str, torch.Tensor]:
    return {t: torch.tensor(v, dtype=dtype) for t, v in zip(TASKS, row, strict=True)}


def plain(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    return {task: weight.item() for task, weight in weights.items()}


def ran(name, rows=SOME) -> balance.Balancer:
    """The rule after an epoch of each row."""
    rule = balance.build(name, TASKS)
    for row in rows:
        rule.weights(losses(row))
        rule.end_epoch()
    return rule


@settings(max_examples=40, deadline=None)
@example(rows=[(3e38, 0.0, -3e38, 1.0), (0.0, 3e38, 0.0, 0.0)], dtype=torch.float32)
@given(rows=ROWS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_weights_stay_finite_and_never_negative(name, rows, dtype):
    rule = balance.build(name, TASKS)
    for row in rows:
        weights = rule.weights(losses(row, dtype))
        assert set(weights) == set(TASKS)
        assert all(w.isfinite() and w >= 0 and w.shape == () for w in weights.values())
        assert torch.as_tensor(rule.penalty()).isfinite()
        rule.end_epoch()


def test_restored_state_gives_the_same_next_weights(name):
    rule, other = ran(name), balance.build(name, TASKS)
    other.load_state_dict(rule.state_dict())
    for row in reversed(SOME):
        first, second = (r.weights(losses(row)) for r in (rule, other))
        assert plain(first) == plain(second)
        rule.end_epoch()
        other.end_epoch()
    for key, value in rule.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_no_gradient_flows_through_the_weights(name):
    rule = balance.build(name, TASKS)
    inputs = {k: v.requires_grad_() for k, v in losses(SOME[0]).items()}
    weights = rule.weights(inputs)
    total = sum(weights[k] * inputs[k] for k in TASKS) + rule.penalty()
    total.backward()
    for task in TASKS:
        assert torch.equal(inputs[task].grad, weights[task].detach())
    learnt = list(rule.parameters())
    assert all(p.grad is not None for p in learnt)
    assert all(w.requires_grad == bool(learnt) for w in weights.values())


def test_weights_come_by_name_not_by_position(name):
    row = losses(SOME[1])
    there, back = ran(name).weights(row), ran(name).weights(dict(reversed(row.items())))
    assert plain(there) == plain(back)


def test_low_precision_losses_get_float32_weights(name):
    weights = balance.build(name, TASKS).weights(losses(SOME[0], torch.bfloat16))
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_other_losses_than_the_built_for_are_refused(name):
    rule = balance.build(name, TASKS)
    with pytest.raises(ConfigError, match="weighs cd, fd, sd, hnd, but got cd"):
        rule.weights({"cd": torch.tensor(1.0)})


@pytest.mark.parametrize("tasks", [(), ("cd", "cd")])
def test_tasks_must_be_distinct(name, tasks):
    with pytest.raises(ConfigError, match="distinct"):
        balance.build(name, tasks)
