import numpy as np
import pytest

from crosstill.errors import ConfigError
from crosstill.train.batches import Sampler


def epoch(sampler: Sampler, number: int) -> list[int]:
    return [c for s in range(sampler.steps_per_epoch) for c in sampler.pick(number, s).captions]


@pytest.fixture
def split(cached):
    return cached.split("train")


def test_an_epoch_shows_every_caption_once(split):
    sampler = Sampler(split, batch_size=16, captions_per_image=1, seed=0)
    assert sorted(epoch(sampler, 0)) == list(range(240))


def test_rows_are_a_function_of_seed_epoch_and_step_alone(split):
    first = Sampler(split, 16, 1, seed=3)
    wanted = {(e, s): first.pick(e, s).captions for e in range(3) for s in range(15)}
    for (e, s), captions in reversed(wanted.items()):  # any order, any process
        assert (Sampler(split, 16, 1, seed=3).pick(e, s).captions == captions).all()
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(Sampler(split, 16, 1, seed=4), 0)


def test_without_shuffling_captions_come_in_the_order_of_the_data(split):
    whole = Sampler(split, 50, 1, seed=0, shuffle=False)
    assert epoch(whole, 0) == epoch(whole, 1) == list(range(200))  # 40 do not fill a batch
    short = Sampler(split, 50, 1, seed=0, steps=3, shuffle=False)
    assert epoch(short, 0) + epoch(short, 1) == [*range(200), *range(100)]


def test_captions_of_one_image_come_together_when_asked(split):
    sampler = Sampler(split, batch_size=20, captions_per_image=5, seed=0)
    assert sorted(epoch(sampler, 0)) == list(range(240))
    for step in range(sampler.steps_per_epoch):
        picked = sampler.pick(0, step)
        assert len(np.unique(picked.images)) == 4
        assert (split.owner[picked.captions] == picked.images).all()


def test_an_image_keeps_its_view_for_an_epoch(split):
    sampler = Sampler(split, 240, 1, seed=0, views=3)
    picked = sampler.pick(0, 0)
    by_image = {}
    for image, view in zip(picked.images, picked.views, strict=True):
        assert by_image.setdefault(image, view) == view
    assert set(by_image.values()) == {0, 1, 2}


def test_a_batch_larger_than_the_data_says_what_to_do(split):
    with pytest.raises(ConfigError, match="batch_size=240"):
        Sampler(split, 241, 1, seed=0)


def test_a_short_epoch_ends_after_its_steps_and_the_next_draws_anew(split):
    short, whole = (Sampler(split, 24, 1, seed=0, steps=steps) for steps in (3, None))
    assert short.steps_per_epoch == 3
    assert Sampler(split, 24, 1, seed=0, steps=10**6).steps_per_epoch == whole.steps_per_epoch
    for epoch in (0, 1):
        assert np.array_equal(short.pick(epoch, 2).captions, whole.pick(epoch, 2).captions)
    assert not np.array_equal(short.pick(0, 0).captions, short.pick(1, 0).captions)
