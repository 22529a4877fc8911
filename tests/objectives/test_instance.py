from math import e, log

import pytest
import torch

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.types import Features

EYE = torch.eye(4, dtype=torch.float64)
IDS = torch.arange(4)


def loss(**options) -> objectives.Objective:
    return objectives.build("instance", temperature=1.0, **options)


@pytest.mark.parametrize(("side", "sides"), [("both", 2), ("image", 1), ("text", 1)])
def test_an_orthonormal_batch_that_agrees(side, sides):
    value = loss(side=side)(Features(EYE, EYE), Features(EYE, EYE), IDS)
    assert value.item() == pytest.approx(sides * log(1 + 3 / e), abs=1e-12)


def test_it_is_the_mean_of_both_directions():
    # student (2 e1, 0) against teacher (e1, e2): S = [[2, 0], [0, 0]]
    student = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    teacher = EYE[:2, :2]
    rows = columns = log(1 + e**-2) + log(2)
    value = loss(side="image")(Features(student, student), Features(teacher, teacher), IDS[:2])
    assert value.item() == pytest.approx((rows + columns) / 4, abs=1e-12)


def test_directions_differ():
    # S = [[1, 1], [0, 0]]: rows ln 2 twice; columns ln(1 + 1/e) and ln(1 + e)
    student = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    teacher = EYE[:2, :2]
    value = loss(side="text")(Features(student, student), Features(teacher, teacher), IDS[:2])
    wanted = (2 * log(2) + log(1 + 1 / e) + log(1 + e)) / 4
    assert value.item() == pytest.approx(wanted, abs=1e-12)


def test_rows_of_one_image_are_no_negatives():
    # images 0, 0, 1, 2: two rows have two negatives, two have three
    value = loss(side="image")(Features(EYE, EYE), Features(EYE, EYE), torch.tensor([0, 0, 1, 2]))
    assert value.item() == pytest.approx((log(1 + 2 / e) + log(1 + 3 / e)) / 2, abs=1e-12)


def test_modalities_do_not_meet():
    """A student whose images look like the teacher's captions has found nothing."""
    turned = EYE[[1, 2, 3, 0]]
    right = loss()(Features(EYE, turned), Features(EYE, turned), IDS)
    crossed = loss()(Features(turned, EYE), Features(EYE, turned), IDS)
    assert right.item() == pytest.approx(2 * log(1 + 3 / e), abs=1e-12)
    assert crossed.item() == pytest.approx(2 * log(3 + e), abs=1e-12)


def test_only_its_side_is_needed():
    only = loss(side="image")
    assert only.needs == {"image"}
    student = Features(EYE.clone().requires_grad_(), EYE.clone().requires_grad_())
    only(student, Features(EYE, torch.empty(0)), IDS).backward()
    assert student.image.grad is not None and student.text.grad is None


def test_a_temperature_of_nothing():
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        objectives.build("instance", temperature=0.0)
