"""What is computed from a cache once: whole, or made again, and never twice at a time."""

import threading

import numpy as np
import torch

from crosstill import cache, evaluate
from crosstill.cache import memo
from support import small_student, wait_for


def test_it_is_computed_once_and_made_again_when_damaged(cached):
    calls = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.arange(6.0).view(2, 3)

    for _ in range(2):
        assert torch.equal(
            memo.memoised_tensor(cached, "once", compute), torch.arange(6.0).view(2, 3)
        )
    assert len(calls) == 1
    path = cached.folder / "pixels/once.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert torch.equal(memo.memoised_tensor(cached, "once", compute), torch.arange(6.0).view(2, 3))
    assert len(calls) == 2


def test_one_may_be_computed_from_another(cached):
    inner = lambda: memo.memoised_tensor(cached, "inner", lambda: torch.ones(2))  # noqa: E731
    assert memo.memoised_tensor(cached, "outer", lambda: 2 * inner()).tolist() == [2, 2]


def test_a_second_process_waits_and_finds_it_done(cached):
    begun, calls, found = [], [], []

    def slow() -> torch.Tensor:
        calls.append(1)
        wait_for(lambda: len(begun) == 4)
        return torch.ones(1)

    def ask() -> None:
        begun.append(1)
        found.append(memo.memoised_tensor(cached, "race", slow))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 4


def test_a_frozen_towers_rows_are_those_of_the_tower(cached, monkeypatch):
    student, split = small_student(cached), cached.split("train")
    images = evaluate.frozen_images(student, cached, split)
    texts = evaluate.frozen_texts(student, cached, split)
    store = cache.pixels(cached, split, student.preprocess)
    assert torch.equal(images, evaluate.pool_images(student, store))
    tokens = student.tokenize([cached.texts[row] for row in split.captions])
    assert torch.equal(texts, evaluate.pool_texts(student, tokens))
    monkeypatch.setattr("crosstill.evaluate.embedding.pool_images", None)
    assert torch.equal(evaluate.frozen_images(student, cached, split), images)
    other = small_student(cached)
    with torch.no_grad():
        next(other.image_tower.parameters()).add_(1)
    monkeypatch.undo()
    assert not np.array_equal(evaluate.frozen_images(other, cached, split), images)
