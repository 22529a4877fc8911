"""fitnets, at and masked_feature against numbers placed by hand."""

from math import sqrt

import pytest
import torch

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.at import attention
from crosstill.types import Features, Hidden

IDS = torch.arange(1)


def close(value: torch.Tensor, expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9)


def hidden(*rows) -> Hidden:
    return Hidden({"middle": torch.tensor(rows, dtype=torch.float64)})


def test_fitnets_by_hand():
    # student (1, 1, 1, 2) = [1, 3]; W = (2, -1), b = (0, 1): channels [2, 6] and [0, -2];
    # teacher channels [2, 2] and [2, 2], whose root mean square is 2: [1, 1] and [1, 1]
    student, teacher = hidden([[[1.0, 3.0]]]), hidden([[[2.0, 2.0]], [[2.0, 2.0]]])
    loss = objectives.build("fitnets")
    loss.adapt(student, teacher)
    with torch.no_grad():
        loss.regressor.weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
        loss.regressor.bias.copy_(torch.tensor([0.0, 1.0]))
    close(loss(student, teacher, IDS), (1 + 25 + 1 + 9) / 4)


def test_fitnets_pools_the_larger_map():
    student = hidden([[[1.0, 3.0], [5.0, 7.0]]])
    teacher = hidden([[[2.0]]])
    loss = objectives.build("fitnets")
    loss.adapt(student, teacher)
    with torch.no_grad():
        loss.regressor.weight.fill_(1.0)
        loss.regressor.bias.zero_()
    close(loss(student, teacher, IDS), (4 - 1) ** 2)


def test_fitnets_starts_from_its_seed():
    first, again, other = (objectives.build("fitnets", seed=seed) for seed in (1, 1, 2))
    for loss in (first, again, other):
        torch.rand(3)
        loss.adapt(hidden([[[1.0, 3.0]]]), hidden([[[2.0, 2.0]]]))
    assert torch.equal(first.regressor.weight, again.regressor.weight)
    assert not torch.equal(first.regressor.weight, other.regressor.weight)


def test_attention_by_hand():
    # squares summed over channels: 9 + 0 and 0 + 16; as a unit row (9, 16) / sqrt(337)
    maps = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]], dtype=torch.float64)
    expected = torch.tensor([[9.0, 16.0]], dtype=torch.float64) / sqrt(337)
    torch.testing.assert_close(attention(maps, (1, 2)), expected, rtol=0, atol=1e-12)


def test_at_is_the_distance_between_unit_maps():
    # orthogonal attention is sqrt(2) apart; scale and width do not matter
    student, teacher = hidden([[[5.0, 0.0]]]), hidden([[[0.0, 1.0]], [[0.0, 2.0]]])
    loss = objectives.build("at", layers=["middle"])
    close(loss(student, teacher, IDS), sqrt(2))
    assert loss(student, hidden([[[0.1, 0.0]]]), IDS) < 1e-5


def test_at_is_the_mean_over_layers():
    one, other = torch.tensor([[[[1.0, 0.0]]]]).double(), torch.tensor([[[[0.0, 1.0]]]]).double()
    loss = objectives.build("at", layers=["first", "last"])
    value = loss(Hidden({"first": one, "last": one}), Hidden({"first": one, "last": other}), IDS)
    assert value.item() == pytest.approx(sqrt(2) / 2, abs=1e-5)


def test_masked_feature_is_the_mean_square_error_of_images():
    image, text = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    loss = objectives.build("masked_feature")
    close(loss(Features(image, text), Features(text, image), IDS), 1.0)
    close(loss(Features(image, text), Features(image, image), IDS), 0.0)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("at", {"layers": []}, "layers is empty"),
        ("masked_feature", {"ratio": 1.0}, "ratio must be from 0 to below 1"),
        ("fitnets", {"layer": 0.5}, "layer = 0.5 does not fit"),
    ],
)
def test_refusals(name, option, message):
    with pytest.raises(ConfigError, match=message):
        objectives.build(name, **option)
