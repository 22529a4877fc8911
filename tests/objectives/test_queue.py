import pytest
import torch

from crosstill.objectives.parts import NOBODY, Queue
from crosstill.types import Features, Ids


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
        for side in range(2):
            # from the pointer on, oldest first
            assert queue.ids[side].roll(-int(queue.pointer[side])).tolist() == held
            known = queue.ids[side] != NOBODY
            rows_held = queue.entries[side, known, side]
            assert torch.equal(rows_held.long(), queue.ids[side, known])


def test_batches_of_changing_size():
    queue = Queue(4, dim=2, seed=0)
    for ids in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]):
        queue.push(*rows(ids))
    for ids, oldest in zip(queue.ids, queue.pointer.tolist(), strict=True):
        assert ids.roll(-oldest).tolist() == [9, 10, 11, 12]


def test_the_sides_of_a_batch_may_differ_in_length():
    queue = Queue(4, dim=2, seed=0)
    (image, _), image_ids = rows([1, 2, 3])
    (_, text), text_ids = rows([7])
    for _ in range(2):
        queue.push(Features(image, text), Ids(image_ids, text_ids, paired=0))
    queue.push(Features(image[:0], text), Ids(image_ids[:0], text_ids, paired=0))
    assert queue.ids[0].roll(-int(queue.pointer[0])).tolist() == [3, 1, 2, 3]
    assert queue.ids[1].tolist() == [7, 7, 7, NOBODY]
    assert queue.entries[1, :3, 1].tolist() == [7, 7, 7]


def test_the_queue_of_an_older_checkpoint_goes_on():
    """It had one row of ids and one pointer for both sides."""
    first, second = Queue(4, dim=2, seed=0), Queue(4, dim=2, seed=1)
    first.push(*rows([1, 2, 3]))
    state = first.state_dict()
    older = {**state, "ids": state["ids"][0], "pointer": state["pointer"][0]}
    second.load_state_dict(older)
    for queue in (first, second):
        queue.push(*rows([4, 5]))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


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
