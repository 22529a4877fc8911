"""Rules that every loss obeys; a new file in `objectives/` is held to them with no edit here."""

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.types import Features

B, D, SMALL = 8, 6, 16

pytestmark = pytest.mark.parametrize("name", objectives.known())


def build(name: str) -> objectives.Objective:
    """The loss with defaults, but for a queue that a gradient check can afford."""
    given = {"dim": D, "keys": torch.arange(B)}
    try:
        return objectives.build(name, **given, queue_size=SMALL)
    except ConfigError:
        return objectives.build(name, **given)


def unit(generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def pair(dtype: torch.dtype = torch.float64) -> tuple[Features, Features, torch.Tensor]:
    """A random student, a teacher whose image and text agree, and the ids of the images."""
    generator = torch.Generator().manual_seed(0)
    student = Features(unit(generator, dtype), unit(generator, dtype))
    image = unit(generator, dtype)
    text = normalize(image + 0.1 * unit(generator, dtype), dim=1)
    return student, Features(image, text), torch.tensor([0, 1, 2, 3, 4, 5, 5, 6])


def with_gradient(features: Features) -> Features:
    return Features(*(x.clone().requires_grad_() for x in features))


def filled(name: str) -> objectives.Objective:
    """The loss after it has taken note of one batch."""
    loss, (_, teacher, ids) = build(name), pair()
    loss.update(teacher, ids)
    return loss


def test_gives_a_finite_scalar(name):
    value = filled(name)(*pair())
    assert value.shape == ()
    assert value.isfinite()


def test_gradient_is_that_of_the_value(name):
    loss, (student, teacher, ids) = filled(name), pair()
    inputs = tuple(with_gradient(student))
    assert torch.autograd.gradcheck(lambda *s: loss(Features(*s), teacher, ids), inputs)


def test_gradient_reaches_both_towers_and_never_the_teacher(name):
    loss, (student, teacher, ids) = filled(name), pair()
    student, teacher = with_gradient(student), with_gradient(teacher)
    loss(student, teacher, ids).backward()
    loss.update(teacher, ids)
    assert all(x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_order_of_the_batch_is_irrelevant(name):
    loss, (student, teacher, ids) = filled(name), pair()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    shuffled = [Features(*(x[order] for x in side)) for side in (student, teacher)]
    expected = loss(student, teacher, ids)
    torch.testing.assert_close(loss(*shuffled, ids[order]), expected, rtol=1e-12, atol=1e-12)


def test_a_perfect_student_pays_no_more_than_a_random_one(name):
    loss, (student, teacher, ids) = filled(name), pair()
    assert loss(teacher, teacher, ids) <= loss(student, teacher, ids)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("value", [0.0, D**-0.5], ids=["zero", "identical"])
def test_finite_for_degenerate_features(name, value, rows):
    constant = torch.full((rows, D), value, dtype=torch.float64)
    student = with_gradient(Features(constant, constant))
    loss = build(name)(student, Features(constant, constant), torch.arange(rows))
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in student)


def test_finite_when_the_batch_shows_one_image_only(name):
    loss, (student, teacher, _) = build(name), pair()
    ids = torch.full((B,), 3)
    loss.update(teacher, ids)
    assert loss(student, teacher, ids).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite_in_low_precision(name, dtype):
    loss, (student, teacher, ids) = filled(name), pair(dtype)
    exact = loss(*pair())
    value = loss(with_gradient(student), teacher, ids)
    value.backward()
    torch.testing.assert_close(value.double(), exact, rtol=0.05, atol=0.02)


def test_saved_state_is_all_of_it(name):
    loss, (student, teacher, ids) = filled(name), pair()
    other = build(name)
    other.load_state_dict(loss.state_dict())
    for twin in (loss, other):
        twin.update(Features(*student), ids)
    assert torch.equal(loss(student, teacher, ids), other(student, teacher, ids))
    for key, value in loss.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_needs_are_teacher_features(name):
    assert build(name).needs <= {"image", "text"}
