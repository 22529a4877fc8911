"""RELIABILITY's metric oracles M1-M6, known mistakes of public code, and a brute-force twin."""

from itertools import permutations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from crosstill.errors import DataError
from crosstill.evaluate import recall
from crosstill.evaluate.recall import from_scores, mean, retrieval


def fives(images: int) -> torch.Tensor:
    return torch.arange(images).repeat_interleave(5)


def exactly(*values):
    return pytest.approx(values, abs=1e-9)


def six(result):
    return (*result.i2t.fair, *result.t2i.fair)


def test_perfect_scores_with_five_captions():
    # a 1:1 truth table would give 20
    result = from_scores(torch.eye(20)[:, fives(20)], fives(20))
    assert six(result) == (100,) * 6
    assert result.rsum == 600
    assert (result.images, result.captions) == (20, 100)
    assert result.warning is None


@pytest.mark.parametrize("n", [20, 100])
def test_all_scores_equal(n):
    result = from_scores(torch.zeros(n, 5 * n), fives(n))
    assert result.t2i.fair == exactly(100 / n, 500 / n, 1000 / n)
    none = [comb(5 * n - 5, k) / comb(5 * n, k) for k in (1, 5, 10)]
    assert result.i2t.fair == exactly(*(100 * (1 - x) for x in none))
    assert result.t2i.optimistic == result.i2t.optimistic == (100, 100, 100)
    assert result.t2i.pessimistic == result.i2t.pessimistic == (0, 0, 0)
    assert "tied scores leave up to 100.0 points" in result.warning


def test_all_scores_equal_in_figures():
    result = from_scores(torch.zeros(100, 500), fives(100))
    assert result.i2t.fair == pytest.approx((1.0, 4.9203, 9.6450), abs=5e-5)


def test_anti_identity():
    assert six(from_scores(-torch.eye(20)[:, fives(20)], fives(20))) == (0,) * 6


def test_each_query_prefers_the_neighbour_image():
    # image pair (2i, 2i + 1): partner's captions first, own second
    n = 20
    scores = torch.eye(n)
    scores = (scores + 2 * scores[torch.arange(n) ^ 1])[:, fives(n)]
    result = from_scores(scores, fives(n))
    assert result.t2i.fair == (0, 100, 100)
    assert result.i2t.fair == (0, 0, 100)


def random_case(seed: int = 0, images: int = 30, captions: int = 77):
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(images, (captions - images,), generator=generator)
    owner = torch.cat([torch.arange(images), more])
    owner = owner[torch.randperm(captions, generator=generator)]
    image = normalize(torch.randn(images, 8, generator=generator), dim=1)
    text = normalize(image[owner] + torch.randn(captions, 8, generator=generator), dim=1)
    return image, text, owner


def test_order_of_images_and_of_captions_is_irrelevant():
    image, text, owner = random_case()
    scores = image @ text.T
    rows, columns = torch.randperm(30), torch.randperm(77)
    moved = from_scores(scores[rows][:, columns], rows.argsort()[owner[columns]])
    assert six(moved) == exactly(*six(from_scores(scores, owner)))


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1e6])
def test_positive_scale_is_irrelevant(factor):
    image, text, owner = random_case()
    scores = image @ text.T
    assert from_scores(scores * factor, owner) == from_scores(scores, owner)


def test_directions_are_not_swapped():
    # both captions prefer image 0, both images prefer caption 0
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.1]])
    result = from_scores(scores, torch.tensor([0, 1]))
    assert (result.i2t.r1, result.t2i.r1) == (50, 50)
    # one more caption of image 1 that it prefers: only i2t gains
    scores = torch.tensor([[0.9, 0.5, 0.99], [0.8, 0.1, 0.95]])
    result = from_scores(scores, torch.tensor([0, 1, 1]))
    assert (result.i2t.r1, result.t2i.r1) == exactly(50, 100 / 3)


def in_random_order(scores: list[float], true: set[int], depth: int) -> float:
    """Share of all orders of equals that put a true candidate among the first `depth`."""
    orders = {tuple(sorted(p, key=lambda i: -scores[i])) for p in permutations(range(len(scores)))}
    return sum(bool(true & set(order[:depth])) for order in orders) / len(orders)


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=3, max_size=3),
    extra=st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
def test_fair_recall_is_the_average_over_every_order_of_equals(scores, extra):
    owner = torch.tensor([0, 1, 2, *extra])
    result = from_scores(torch.tensor(scores), owner)
    for depth, fair in ((1, result.i2t.r1), (5, result.i2t.r5)):
        found = [
            in_random_order(row, set((owner == i).nonzero().flatten().tolist()), depth)
            for i, row in enumerate(scores)
        ]
        assert fair == pytest.approx(100 * sum(found) / 3, abs=1e-9)
    columns = list(zip(*scores, strict=True))
    found = [in_random_order(c, {int(o)}, 1) for c, o in zip(columns, owner, strict=True)]
    assert result.t2i.r1 == pytest.approx(100 * sum(found) / 6, abs=1e-9)
    for r in (result.i2t, result.t2i):
        assert all(p <= f + 1e-9 for p, f in zip(r.pessimistic, r.fair, strict=True))
        assert all(f <= o + 1e-9 for f, o in zip(r.fair, r.optimistic, strict=True))


def test_one_caption_written_for_two_images():
    # images 0 and 1 share their caption's features: each text query is a coin toss at worst
    image = torch.eye(12)
    text = torch.eye(12)
    text[1] = text[0]
    result = retrieval(image, text, torch.arange(12))
    # caption 1 finds image 0; image 0 ties captions 0 and 1; image 1 ties all but nothing above
    assert result.t2i.r1 == pytest.approx(100 * 11 / 12)
    assert result.i2t.r1 == pytest.approx(100 * (10 + 1 / 2 + 1 / 12) / 12)


def test_collapsed_features_get_no_credit():
    image = normalize(torch.randn(512), dim=0).expand(40, 512)
    result = retrieval(image, image.repeat_interleave(5, 0), fives(40))
    assert result.t2i.r1 == pytest.approx(2.5)
    assert result.i2t.r1 == pytest.approx(2.5)


def test_low_precision_features_are_ranked_in_float32():
    image, text, owner = random_case()
    low = image.bfloat16(), text.bfloat16()
    assert retrieval(*low, owner) == retrieval(low[0].float(), low[1].float(), owner)
    assert retrieval(*low, owner).warning is None


@pytest.mark.parametrize(("kept", "block"), [(0, 1), (0, 400), (2**30, 1), (2**30, 1000)])
def test_blocks_change_nothing(monkeypatch, kept, block):
    image, text, owner = random_case()
    image[3], text[5] = image[4], text[6]
    expected = retrieval(image, text, owner)
    monkeypatch.setattr(recall, "KEPT", kept)
    monkeypatch.setattr(recall, "BLOCK", block)
    assert six(retrieval(image, text, owner)) == exactly(*six(expected))


def test_scores_that_were_given_are_left_alone():
    image, text, owner = random_case()
    scores = image @ text.T
    before = scores.clone()
    assert from_scores(scores, owner) == retrieval(image, text, owner)
    assert torch.equal(scores, before)


def test_infinite_scores_rank_at_the_ends():
    scores = torch.tensor([[float("inf"), -float("inf")], [-float("inf"), 0.0]])
    assert from_scores(scores, torch.arange(2)).rsum == 600


def test_json_holds_plain_numbers():
    value = from_scores(torch.zeros(20, 100), fives(20)).to_json()
    counts = {"images", "captions", "shared_captions"}
    assert set(value) == {"i2t", "t2i", "rsum", "bounds", "warning"} | counts
    assert set(value["i2t"]) == set(value["t2i"]) == {"r1", "r5", "r10"}
    six_values = [*value["i2t"].values(), *value["t2i"].values()]
    assert value["rsum"] == pytest.approx(sum(six_values))
    assert value["t2i"]["r1"] == pytest.approx(5)
    assert value["bounds"]["optimistic"]["t2i"] == {"r1": 100, "r5": 100, "r10": 100}
    assert value["bounds"]["pessimistic"]["i2t"] == {"r1": 0, "r5": 0, "r10": 0}
    assert "tied" in value["warning"]


def test_mean_of_results():
    results = [
        from_scores(torch.eye(4), torch.arange(4)),
        from_scores(-torch.eye(4), fives(4)[::5]),
    ]
    result = mean(results)
    assert result.rsum == pytest.approx((results[0].rsum + results[1].rsum) / 2)
    assert (result.images, result.captions) == (8, 8)


GOOD = torch.eye(3)


@pytest.mark.parametrize(
    ("image", "text", "owner", "words"),
    [
        (GOOD * float("nan"), GOOD, [0, 1, 2], "features of 3 images are not finite"),
        (
            GOOD,
            GOOD / torch.eye(3),
            [0, 1, 2],
            "3 captions are not finite, first that of caption 0",
        ),
        (GOOD * 1e30, GOOD * 1e30, [0, 1, 2], "overflow; normalise them"),
        (GOOD, GOOD[:, :2], [0, 1, 2], "not features of one width"),
        (GOOD, GOOD, [0, 1], "3 captions, but 2 say"),
        (GOOD, GOOD, [0, 1, 3], "one of the 3 images"),
        (GOOD, GOOD, [0, 1, -1], "one of the 3 images"),
        (GOOD, GOOD, [0, 0, 2], "1 of 3 images have no caption, first image 1"),
        (GOOD, GOOD[:0], [], "one of the 3 images"),
        (GOOD[:0], GOOD[:0], [], "one of the 0 images"),
    ],
)
def test_unusable_features_are_refused(image, text, owner, words):
    with pytest.raises(DataError, match=words):
        retrieval(image, text, torch.tensor(owner, dtype=torch.int64))


def test_unusable_scores_are_refused():
    scores = torch.zeros(2, 2)
    scores[0, 1] = float("nan")
    with pytest.raises(DataError, match="not a number"):
        from_scores(scores, torch.arange(2))
    with pytest.raises(DataError, match="images by captions"):
        from_scores(torch.zeros(4), torch.arange(4))
