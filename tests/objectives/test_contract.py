"""Rules that every loss obeys; a new file in `objectives/` is held to them with no edit here."""

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.types import Features, Hidden, Ids

B, D, SMALL = 8, 6, 16

pytestmark = pytest.mark.parametrize("name", objectives.known())


def build(name: str) -> objectives.Objective:
    """The loss with defaults, but for a queue that a gradient check can afford."""
    given = {"dim": D, "keys": torch.arange(B)}
    try:
        loss = objectives.build(name, **given, queue_size=SMALL)
    except ConfigError:
        loss = objectives.build(name, **given)
    student, teacher, _ = pair(loss)
    if isinstance(student, Hidden):
        loss.adapt(student, teacher)
    return loss


def tensors(noun: Features | Hidden) -> list[torch.Tensor]:
    return list(noun.layers.values()) if isinstance(noun, Hidden) else list(noun)


def like(noun: Features | Hidden, parts) -> Features | Hidden:
    """The same noun with other tensors."""
    if isinstance(noun, Hidden):
        return Hidden(dict(zip(noun.layers, parts, strict=True)))
    return Features(*parts)


def unit(generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return normalize(torch.randn(B, D, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def pair(loss: objectives.Objective, dtype: torch.dtype = torch.float64):
    """A random student, a teacher whose image and text agree, and the ids of the images.

    For a loss that reads layers: maps of other sizes and widths instead.
    """
    generator = torch.Generator().manual_seed(0)
    if loss.reads.kind == "hidden":
        sizes = ((B, 3, 4, 4), (B, 5, 3, 3))
        mine, theirs = (
            Hidden(
                {
                    layer: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
                    for layer in loss.reads.layers
                }
            )
            for size in sizes
        )
        return mine, theirs, torch.tensor([0, 1, 2, 3, 4, 5, 5, 6])
    student = Features(unit(generator, dtype), unit(generator, dtype))
    image = unit(generator, dtype)
    text = normalize(image + 0.1 * unit(generator, dtype), dim=1)
    return student, Features(image, text), torch.tensor([0, 1, 2, 3, 4, 5, 5, 6])


def with_gradient(noun: Features | Hidden) -> Features | Hidden:
    return like(noun, [x.clone().requires_grad_() for x in tensors(noun)])


def filled(name: str) -> objectives.Objective:
    """The loss after it has taken note of one batch."""
    loss = build(name)
    _, teacher, ids = pair(loss)
    loss.update(teacher, ids)
    return loss


def test_gives_a_finite_scalar(name):
    loss = filled(name)
    value = loss(*pair(loss))
    assert value.shape == ()
    assert value.isfinite()


def test_gradient_is_that_of_the_value(name):
    loss = filled(name)
    student, teacher, ids = pair(loss)
    inputs = tuple(tensors(with_gradient(student)))
    assert torch.autograd.gradcheck(lambda *s: loss(like(student, s), teacher, ids), inputs)


def test_gradient_reaches_both_towers_and_never_the_teacher(name):
    loss = filled(name)
    student, teacher, ids = pair(loss)
    student, teacher = with_gradient(student), with_gradient(teacher)
    loss(student, teacher, ids).backward()
    loss.update(teacher, ids)
    read = [student.image] if loss.needs == {"image"} else tensors(student)
    assert all(x.grad.abs().sum() > 0 for x in read)
    assert all(x.grad is None for x in tensors(teacher))


def test_order_of_the_batch_is_irrelevant(name):
    loss = filled(name)
    student, teacher, ids = pair(loss)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    shuffled = [like(side, [x[order] for x in tensors(side)]) for side in (student, teacher)]
    expected = loss(student, teacher, ids)
    torch.testing.assert_close(loss(*shuffled, ids[order]), expected, rtol=1e-12, atol=1e-12)


def test_a_perfect_student_pays_no_more_than_a_random_one(name):
    loss = filled(name)
    student, teacher, ids = pair(loss)
    if list(loss.parameters()):
        pytest.skip("what a learnt map makes of the teacher's own layer is chance at first")
    assert loss(teacher, teacher, ids) <= loss(student, teacher, ids)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("value", [0.0, D**-0.5], ids=["zero", "identical"])
def test_finite_for_degenerate_features(name, value, rows):
    loss = build(name)
    student, teacher = (
        like(side, [torch.full_like(x[:rows], value) for x in tensors(side)])
        for side in pair(loss)[:2]
    )
    student = with_gradient(student)
    found = loss(student, teacher, torch.arange(rows))
    found.backward()
    assert found.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in tensors(student))


def test_finite_when_the_batch_shows_one_image_only(name):
    loss = build(name)
    student, teacher, _ = pair(loss)
    ids = torch.full((B,), 3)
    loss.update(teacher, ids)
    assert loss(student, teacher, ids).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite_in_low_precision(name, dtype):
    loss = filled(name)
    student, teacher, ids = pair(loss, dtype)
    exact = loss(*pair(loss))
    value = loss(with_gradient(student), teacher, ids)
    value.backward()
    torch.testing.assert_close(value.double(), exact, rtol=0.05, atol=0.02)


def test_saved_state_is_all_of_it(name):
    loss = filled(name)
    student, teacher, ids = pair(loss)
    other = build(name)
    other.load_state_dict(loss.state_dict())
    for twin in (loss, other):
        twin.update(student, ids)
    assert torch.equal(loss(student, teacher, ids), other(student, teacher, ids))
    for key, value in loss.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_needs_are_teacher_features(name):
    assert build(name).needs <= {"image", "text"}


def without_pairs(name: str) -> objectives.Objective:
    """The loss, if it needs no pairs and reads rows of photos and of texts."""
    loss = build(name)
    if loss.pairs or loss.reads.kind == "hidden":
        pytest.skip("is given pairs only, or layers of photos")
    return loss


def test_a_loss_without_pairs_takes_a_paired_batch_either_way(name):
    loss = without_pairs(name)
    student, teacher, ids = pair(loss)
    loss.update(teacher, ids)
    expected = loss(student, teacher, ids)
    assert torch.equal(loss(student, teacher, Ids(ids, ids, len(ids))), expected)


@pytest.mark.parametrize("photos, texts", [(B, 3), (2, B), (B, 0), (0, B), (0, 0)])
@pytest.mark.parametrize("paired", [0, 2])
def test_a_loss_without_pairs_takes_sides_of_any_length(name, photos, texts, paired):
    loss = without_pairs(name)
    student, teacher, ids = pair(loss)
    paired = min(paired, photos, texts)
    # a text that belongs to no photo has an id of its own
    text_ids = torch.where(torch.arange(B) < paired, ids, -2 - ids)
    every = Ids(ids[:photos], text_ids[:texts], paired)
    student, teacher = (Features(x.image[:photos], x.text[:texts]) for x in (student, teacher))
    student = with_gradient(student)
    value = loss(student, teacher, every)
    assert value.shape == () and value.isfinite()
    missing = {side for side in ("image", "text") if not len(getattr(student, side))}
    if loss.needs <= missing or (loss.across and missing):
        assert value == 0
    else:
        assert value > 0
        gradients = torch.autograd.grad(value, list(student), allow_unused=True)
        assert all(x is None or x.isfinite().all() for x in gradients)
    loss.update(teacher, every)
    assert loss(student, teacher, every).isfinite()


def test_a_loss_without_pairs_does_not_care_which_loose_row_stands_beside_which(name):
    loss = without_pairs(name)
    student, teacher, ids = pair(loss)
    text_ids = torch.where(torch.arange(B) < 3, ids, -2 - ids)
    order = torch.tensor([0, 1, 2, *torch.randperm(B - 3).add(3).tolist()])
    mixed, moved = Ids(ids, text_ids, 3), Ids(ids, text_ids[order], 3)
    turned = [Features(x.image, x.text[order]) for x in (student, teacher)]
    expected = loss(student, teacher, mixed)
    torch.testing.assert_close(loss(*turned, moved), expected, rtol=1e-12, atol=1e-12)
