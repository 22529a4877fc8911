import pytest
import torch

from crosstill.objectives.parts import NOBODY, Queue
from crosstill.types import Features


def rows(ids: list[int]) -> tuple[Features, torch.Tensor]:
    """Embeddings that say which row they are: image (i, 0), text (0, i)."""
    numbers = torch.tensor(ids, dtype=torch.float32)
    zero = torch.zeros_like(numbers)
    image, text = torch.stack([numbers, zero], 1), torch.stack([zero, numbers], 1)
    return Features(image, text), torch.tensor(ids)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 12])
def test_it_holds_the_newest_rows_whatever_the_batch(batch):
    length = 5
    queue = Queue(length, dim=2, seed=0)
    stream = list(range(100, 130))
    for start in range(0, len(stream), batch):
        queue.push(*rows(stream[start : start + batch]))
        seen = stream[: start + batch]
        held = ([NOBODY] * length + seen)[-length:]
        assert sorted(queue.ids.tolist()) == sorted(held)
        # from the pointer on, oldest first
        assert torch.equal(queue.ids.roll(-int(queue.pointer)), torch.tensor(held))
        known = queue.ids != NOBODY
        assert torch.equal(queue.entries[0, known, 0].long(), queue.ids[known])
        assert torch.equal(queue.entries[1, known, 1].long(), queue.ids[known])


def test_batches_of_changing_size():
    queue = Queue(4, dim=2, seed=0)
    for ids in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]):
        queue.push(*rows(ids))
    assert queue.ids.roll(-int(queue.pointer)).tolist() == [9, 10, 11, 12]


def test_saved_and_restored_it_goes_on_the_same():
    first, second = Queue(5, dim=2, seed=0), Queue(5, dim=2, seed=1)
    first.push(*rows([1, 2, 3]))
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        queue.push(*rows([4, 5, 6, 7]))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert set(first.state_dict()) == {"entries", "ids", "pointer"}


def test_half_precision_rows_are_taken_and_carry_no_gradient():
    queue = Queue(4, dim=2, seed=0)
    features, ids = rows([1, 2])
    queue.push(Features(*(x.half().requires_grad_() for x in features)), ids)
    assert queue.entries.dtype == torch.float32
    assert not queue.entries.requires_grad
