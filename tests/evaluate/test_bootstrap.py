from math import sqrt

import pytest
import torch

from crosstill.errors import DataError
from crosstill.evaluate.bootstrap import Answers, average, paired
from crosstill.evaluate.recall import chances, retrieval

COUNT = 200
OWNER = torch.arange(COUNT).repeat_interleave(5)


def answers(image: torch.Tensor, text: torch.Tensor) -> Answers:
    return Answers(image.double(), text.double(), OWNER[: len(text)])


def drawn(seed: int) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(COUNT, 3, generator=generator) < 0.5
    return answers(image, torch.rand(5 * COUNT, 3, generator=generator) < 0.4)


def test_chances_average_to_the_recalls():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(20, 8, generator=generator), torch.randn(60, 8, generator=generator)
    owner = torch.arange(20).repeat_interleave(3)
    found = retrieval(image, text, owner)
    of_image, of_text = chances(image, text, owner)
    assert (100 * of_image.mean(0)).tolist() == pytest.approx(list(found.i2t.fair))
    assert (100 * of_text.mean(0)).tolist() == pytest.approx(list(found.t2i.fair))
    assert Answers(of_image, of_text, owner).rsum == pytest.approx(found.rsum)


def test_a_model_does_not_differ_from_itself():
    found = paired(drawn(0), drawn(0), draws=200)
    assert (found.rsum, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_gain_on_every_query_is_certain():
    # every image and every caption 0.1 better at each depth: 6 * 10 points in every resample
    base = drawn(0)
    better = Answers(base.image + 0.1, base.text + 0.1, base.owner)
    found = paired(better, base, draws=499)
    assert (found.rsum, found.low, found.high) == pytest.approx((60, 60, 60))
    assert found.p == pytest.approx(2 / 500)
    assert paired(base, better, draws=499).high == pytest.approx(-60)


def test_the_interval_is_that_of_a_mean():
    # only R@1 of images differs, by +1 or -1: the interval is 1.96 standard errors to both sides
    base = answers(torch.zeros(COUNT, 3), torch.zeros(5 * COUNT, 3))
    signs = (torch.arange(COUNT) % 4 > 0).double() * 2 - 1
    other = answers(torch.stack([signs, 0 * signs, 0 * signs], 1), torch.zeros(5 * COUNT, 3))
    found = paired(other, base)
    error = 100 * float(signs.std(correction=0)) / sqrt(COUNT)
    assert found.rsum == pytest.approx(50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_captions_of_one_image_are_drawn_together():
    # all five captions of an image agree, so 1,000 captions are worth no more than 200 images
    base = answers(torch.zeros(COUNT, 3), torch.zeros(5 * COUNT, 3))
    signs = ((torch.arange(COUNT) % 2) * 2 - 1).double()
    text = torch.zeros(5 * COUNT, 3).double()
    text[:, 0] = signs[OWNER]
    found = paired(answers(torch.zeros(COUNT, 3), text), base)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 100 / sqrt(COUNT), rel=0.05)
    assert found.p > 0.9


def test_chance_is_rarely_called_a_difference():
    starred = sum(paired(drawn(s), drawn(s + 100), draws=500).p < 0.05 for s in range(40))
    assert starred <= 6


def test_seeds_are_averaged():
    one, two = drawn(0), drawn(1)
    both = average([one, two])
    assert both.rsum == pytest.approx((one.rsum + two.rsum) / 2)


def test_refusals():
    few = answers(torch.zeros(29, 3), torch.zeros(145, 3))
    with pytest.raises(DataError, match="29 images are too few for a bootstrap; give it 30"):
        paired(few, few)
    with pytest.raises(DataError, match="different queries"):
        paired(few, drawn(0))
