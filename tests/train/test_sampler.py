import numpy as np
import pytest

from crosstill.cache import Split
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


def mixture(images: int, captions: list[int], loose: int) -> Split:
    """A split of so many photos, these owners of its captions, and so many loose texts."""
    owner = np.array([*captions, *[-1] * loose], dtype=int)
    return Split("train", np.arange(images), np.arange(len(owner)), owner)


MIXED = mixture(40, [i // 5 for i in range(50)], 90)  # 10 photos of 5 captions, 30 without any


def test_a_batch_of_a_mixture_is_pairs_then_photos_and_texts_of_none():
    sampler = Sampler(MIXED, 16, 1, seed=0)
    assert sampler.paired == 8
    seen = [sampler.pick(0, step) for step in range(sampler.steps_per_epoch)]
    for picked in seen:
        assert len(picked.captions) == len(picked.images) == len(picked.views) == 16
        assert (MIXED.owner[picked.captions[:8]] == picked.images[:8]).all()
        assert (picked.captions[8:] >= 50).all() and (picked.images[8:] >= 10).all()
    # the 90 texts take longest: 11 steps; all pairs and photos come at least once
    assert sampler.steps_per_epoch == 11
    texts = np.concatenate([picked.captions[8:] for picked in seen])
    assert len(np.unique(texts)) == len(texts) == 88
    assert {*np.concatenate([picked.captions[:8] for picked in seen])} == {*range(50)}
    assert {*np.concatenate([picked.images[8:] for picked in seen])} == {*range(10, 40)}


def test_rows_of_a_mixture_are_a_function_of_seed_epoch_and_step_alone():
    first = Sampler(MIXED, 16, 2, seed=3, views=3)
    wanted = {(e, s): first.pick(e, s) for e in range(2) for s in range(11)}
    for (e, s), picked in reversed(wanted.items()):
        again = Sampler(MIXED, 16, 2, seed=3, views=3).pick(e, s)
        for ours, theirs in zip(vars(picked).values(), vars(again).values(), strict=True):
            assert np.array_equal(ours, theirs)
    assert not np.array_equal(wanted[0, 0].captions, wanted[1, 0].captions)
    assert not np.array_equal(wanted[0, 0].images, wanted[1, 0].images)


@pytest.mark.parametrize(
    ("split", "share", "paired"),
    [
        (MIXED, None, 8),
        (MIXED, 0.25, 4),
        (MIXED, 0.0, 0),
        (MIXED, 1.0, 16),
        (mixture(40, [0, 1, 2], 90), None, 3),  # fewer pairs than half of the batch
        (mixture(41, [i // 5 for i in range(200)], 0), None, 15),  # one photo without a caption
        (mixture(40, [], 90), None, 0),
        (mixture(40, [], 0), None, 0),
        (mixture(0, [], 90), None, 0),
    ],
)
def test_the_share_of_pairs(split, share, paired):
    sampler = Sampler(split, 16, 1, seed=0, share=share)
    picked = sampler.pick(0, sampler.steps_per_epoch - 1)
    assert sampler.paired == picked.paired == paired
    assert len(picked.images) == (16 if len(split.images) else 0)
    assert len(picked.captions) == (16 if len(split.captions) else 0)


def test_rows_that_are_lacking_are_drawn_from_all():
    owners = [i // 5 for i in range(50)]
    photos = Sampler(mixture(40, owners, 0), 16, 1, seed=0, share=0.5)
    texts = np.concatenate([photos.pick(0, step).captions[8:] for step in range(6)])
    assert {*texts} <= {*range(50)} and len({*texts}) == 48
    alone = Sampler(mixture(10, owners, 90), 16, 1, seed=0)
    images = np.concatenate([alone.pick(0, step).images[8:] for step in range(6)])
    assert {*images} == {*range(10)}


def test_a_mixture_smaller_than_its_batch_says_what_to_do():
    with pytest.raises(ConfigError, match="more than the 9 photos .* use --set batch_size=9"):
        Sampler(mixture(9, [], 90), 16, 1, seed=0)
    with pytest.raises(ConfigError, match="takes 13 beside its pairs.* more than the 9 photos"):
        Sampler(mixture(9, [0, 1, 2], 90), 16, 1, seed=0)
    with pytest.raises(ConfigError, match="no photo with a caption; leave it out"):
        Sampler(mixture(40, [], 90), 16, 1, seed=0, share=0.5)
