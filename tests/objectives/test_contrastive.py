from math import exp, log

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.types import Features

CLOSE = {"rtol": 0, "atol": 1e-9}
NEW = torch.tensor([1, 2])  # ids that no queue has seen


def axis(i: int, rows: int = 2, dim: int = 4) -> torch.Tensor:
    return torch.eye(dim, dtype=torch.float64)[i].expand(rows, dim)


def loss_with(queue: torch.Tensor, **options) -> objectives.Objective:
    """The loss with these K rows in both queues."""
    loss = objectives.build("contrastive", dim=queue.shape[1], queue_size=len(queue), **options)
    loss.queue.entries.copy_(queue)
    return loss


@pytest.mark.parametrize("k", [1, 7, 8192])
def test_equal_similarities_give_the_log_of_the_candidates(k):
    one = Features(axis(0), axis(0))
    # image and text each pay ln(1 + K)
    expected = torch.tensor(2 * log(1 + k), dtype=torch.float64)
    torch.testing.assert_close(loss_with(axis(0, k))(one, one, NEW), expected, **CLOSE)


def test_orthogonal_negatives():
    one = Features(axis(0), axis(0))
    value = loss_with(axis(1, 8192))(one, one, NEW)
    expected = 2 * log(1 + 8192 * exp(-20))
    assert expected / 2 == pytest.approx(1.68848279e-5, abs=1e-12)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_image_and_text_have_queues_of_their_own():
    loss = loss_with(axis(1, 3), temperature=1.0)
    loss.queue.entries[1] = axis(0, 3)
    one = Features(axis(0), axis(0))
    expected = torch.tensor(log(1 + 3 / exp(1)) + log(4), dtype=torch.float64)
    torch.testing.assert_close(loss(one, one, NEW), expected, **CLOSE)


def test_a_similarity_table_by_hand():
    # cosines with the teacher .6, with the two entries 0 and .8; both modalities alike
    student = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    queue = torch.tensor([[-0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    loss = loss_with(queue, temperature=0.5)
    value = loss(Features(student, student), Features(teacher, teacher), NEW[:1])
    entries = loss.queue.entries[0].double() @ student[0]
    expected = 2 * torch.log(1 + torch.exp((entries - 0.6) / 0.5).sum())
    torch.testing.assert_close(value, expected, **CLOSE)


def test_entries_of_the_own_image_are_no_negatives():
    one = Features(axis(0), axis(0))
    ids = torch.tensor([5, 6])
    masked, paper = (loss_with(axis(0, 4), mask_same_image=m) for m in (True, False))
    for loss in (masked, paper):
        loss.queue.ids.copy_(torch.tensor([5, 5, 9, 9]))
    # row of image 5 has two negatives left, row of image 6 all four
    expected = torch.tensor(log(3) + log(5), dtype=torch.float64)
    torch.testing.assert_close(masked(one, one, ids), expected, **CLOSE)
    expected = torch.tensor(2 * log(5), dtype=torch.float64)
    torch.testing.assert_close(paper(one, one, ids), expected, **CLOSE)


def test_a_queue_of_own_captions_only_costs_nothing():
    loss = loss_with(axis(0, 4))
    loss.queue.ids.fill_(5)
    one = Features(axis(0), axis(0))
    assert loss(one, one, torch.tensor([5, 5])) == 0


def test_forward_does_not_touch_the_queue():
    loss = loss_with(axis(1, 4))
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss(Features(axis(0), axis(0)), Features(axis(0), axis(0)), NEW)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_backward_after_another_forward_and_then_the_update():
    loss = loss_with(axis(1, 4))
    student = Features(axis(0).clone().requires_grad_(), axis(0).clone().requires_grad_())
    total = loss(student, Features(axis(2), axis(2)), NEW)
    total = total + loss(student, Features(axis(3), axis(3)), NEW)
    total.backward()
    loss.update(Features(axis(2), axis(2)), NEW)
    assert loss.queue.ids.tolist() == 2 * [[1, 2, -1, -1]]


def test_the_default_queue_is_random_unit_vectors_by_seed():
    first, same, other = (objectives.build("contrastive", dim=8, seed=s) for s in (0, 0, 1))
    entries = first.queue.entries
    assert entries.shape == (2, 8192, 8)
    assert entries.dtype == torch.float32
    torch.testing.assert_close(entries.norm(dim=2), torch.ones(2, 8192))
    assert torch.equal(entries, same.queue.entries)
    assert not torch.equal(entries, other.queue.entries)
    torch.testing.assert_close(entries, normalize(entries, dim=2))
