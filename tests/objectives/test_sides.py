"""Losses that can look at one side, for teachers that left only one."""

import pytest
import torch

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.types import Features

E1, E2 = torch.eye(4, dtype=torch.float64)[:2].split(1)
IDS = torch.tensor([3])


@pytest.mark.parametrize("name", ["feature", "similarity"])
def test_one_side_by_hand(name):
    """Image rows e1 against e2: L1 mean 2/4, and 1 - (0 + 1) / 2; the texts agree."""
    student, teacher = Features(E1, E1), Features(E2, E1)
    for side, value in {"image": 0.5, "text": 0.0, "both": 0.5}.items():
        loss = objectives.build(name, side=side)
        assert loss(student, teacher, IDS).item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", ["feature", "similarity"])
def test_only_the_chosen_side_is_needed_and_moved(name):
    loss = objectives.build(name, side="image")
    assert loss.needs == {"image"}
    student = Features(E1.clone().requires_grad_(), E1.clone().requires_grad_())
    loss(student, Features(E2, torch.empty(0)), IDS).backward()
    assert student.image.grad is not None and student.text.grad is None


def test_an_unknown_side_names_the_known():
    with pytest.raises(ConfigError, match="side must be one of both, image, text, not 'left'"):
        objectives.build("feature", side="left")
