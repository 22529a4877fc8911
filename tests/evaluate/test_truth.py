"""Captions that several images share are true of each, and all who measure recall agree on it."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstill import data
from crosstill.cache import build
from crosstill.evaluate import CachedSplit, embed, recall, retrieval, teacher_recall
from crosstill.evaluate.recall import by_protocol, chances, folds, from_scores
from crosstill.evaluate.truth import Truth, of_texts
from crosstill.fusion.measure import rerank, score_matrix
from evaluate.judges import SmallJudge
from support import SmallTeacher, small_student

OWNER = torch.tensor([0, 0, 1, 1, 2])
TEXTS = ["a", "b", "b", "c", "b"]


def pairs_of(truth, start=0, stop=3):
    image, text = truth.pairs(start, stop)
    assert (image.diff() >= 0).all()
    pairs = list(zip(image.tolist(), text.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def test_an_equal_text_is_true_of_every_image_that_has_it():
    truth = of_texts(OWNER, TEXTS)
    b = {(image, text) for image in (0, 1, 2) for text in (1, 2, 4)}
    assert pairs_of(truth) == {(0, 0), (1, 3)} | b
    assert pairs_of(truth, 1, 2) == {(1, 1), (1, 2), (1, 3), (1, 4)}
    assert pairs_of(truth, 1, 1) == set()
    assert truth.shared == 3
    assert (
        pairs_of(truth.plain())
        == pairs_of(Truth(OWNER))
        == {(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)}
    )


def test_the_same_text_twice_at_one_image_is_not_shared():
    truth = of_texts(torch.tensor([0, 0, 1]), ["a", "a", "b"])
    assert truth.shared == 0
    assert pairs_of(truth) == {(0, 0), (0, 1), (1, 2)}


def test_one_caption_of_ten_thousand_images_fits_into_memory():
    truth = of_texts(torch.arange(10_000), ["image"] * 10_000)
    assert truth.shared == 10_000
    assert len(truth.pairs(0, 10)[0]) == 100_000


def test_case_and_spaces_make_another_text():
    assert of_texts(torch.arange(3), ["a dog", "A dog", "a  dog"]).shared == 0


def test_known_values():
    # caption 1 is that of image 0 and of image 1; image 2 is above both for it
    scores = torch.tensor(
        [[0.9, 0.2, 0.1, 0.0, 0.0], [0.1, 0.3, 0.3, 0.2, 0.0], [0.0, 0.25, 0.25, 0.5, 0.9]]
    )
    truth = of_texts(torch.tensor([0, 0, 1, 1, 2]), ["a", "b", "b", "c", "d"])
    found = from_scores(scores, truth)
    assert found.shared == 2
    # both "b" find image 1, though one of them was written for image 0; "c" finds image 2
    assert found.t2i.r1 == pytest.approx(80)
    assert from_scores(scores, truth.plain()).t2i.r1 == pytest.approx(60)
    assert found.i2t.r1 == 100


def test_a_tie_between_two_true_images_costs_nothing():
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]).repeat(1, 2)[:, :3]
    truth = of_texts(torch.arange(3), ["a", "a", "b"])
    found = from_scores(scores, truth)
    assert found.t2i.r1 == pytest.approx(200 / 3)
    assert from_scores(scores, torch.arange(3)).t2i.r1 == pytest.approx(100 / 3)


def test_equal_scores_everywhere():
    # of 12 images 3 share their only caption: they are found as often as 3 of 12 come first
    texts = ["same", "same", "same", *map(str, range(9))]
    found = from_scores(torch.zeros(12, 12), of_texts(torch.arange(12), texts))
    expected = 100 * (3 * 3 / 12 + 9 * 1 / 12) / 12
    assert found.t2i.r1 == pytest.approx(expected)
    assert found.i2t.r1 == pytest.approx(expected)


def in_random_order(scores, true, depth):
    orders = {tuple(sorted(p, key=lambda i: -scores[i])) for p in permutations(range(len(scores)))}
    return sum(bool(true & set(order[:depth])) for order in orders) / len(orders)


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=3, max_size=3),
    texts=st.lists(st.sampled_from("abcde"), min_size=5, max_size=5),
)
def test_fair_recall_is_the_average_over_every_order_of_equals(scores, texts):
    owner = [0, 1, 2, 0, 2]
    found = from_scores(torch.tensor(scores), of_texts(torch.tensor(owner), texts))
    said = [{texts[t] for t in range(5) if owner[t] == i} for i in range(3)]
    true = [[texts[t] in said[i] for t in range(5)] for i in range(3)]
    of_images = [
        in_random_order(scores[i], {t for t in range(5) if true[i][t]}, 1) for i in range(3)
    ]
    of_texts_ = [
        in_random_order([row[t] for row in scores], {i for i in range(3) if true[i][t]}, 1)
        for t in range(5)
    ]
    assert found.i2t.r1 == pytest.approx(100 * sum(of_images) / 3, abs=1e-9)
    assert found.t2i.r1 == pytest.approx(100 * sum(of_texts_) / 5, abs=1e-9)


def case(images=40):
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(3)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    image = torch.randn(images, 8, generator=generator)
    text = image[owner] + torch.randn(len(owner), 8, generator=generator)
    texts = [str(int(n)) for n in torch.randint(60, (len(owner),), generator=generator)]
    return image, text, owner, of_texts(owner, texts)


@pytest.mark.parametrize(("kept", "block"), [(0, 1), (0, 400), (2**30, 1000)])
def test_blocks_change_nothing(monkeypatch, kept, block):
    image, text, _, truth = case()
    expected = recall.retrieval(image, text, truth)
    monkeypatch.setattr(recall, "KEPT", kept)
    monkeypatch.setattr(recall, "BLOCK", block)
    assert recall.retrieval(image, text, truth).rsum == pytest.approx(expected.rsum, abs=1e-9)


def test_chances_are_those_of_the_recall():
    image, text, _, truth = case()
    found = recall.retrieval(image, text, truth)
    of_images, of_captions = chances(image, text, truth)
    assert (100 * of_images.mean(0)).tolist() == pytest.approx(list(found.i2t.fair))
    assert (100 * of_captions.mean(0)).tolist() == pytest.approx(list(found.t2i.fair))


def test_folds_count_what_is_shared_inside_them():
    image, text, owner, _ = case()
    # the first captions of images 0 and 1 are equal, and that of image 39 in another fold
    texts = [str(row) for row in range(len(owner))]
    for number in (0, 1, 39):
        texts[int((owner == number).nonzero()[0])] = "same"
    found = folds(image, text, of_texts(owner, texts), size=8)
    assert found.shared == 2
    assert (found.images, found.captions) == (40, 120)
    parts = []
    for start in range(0, 40, 8):
        inside = (owner >= start) & (owner < start + 8)
        some = [texts[row] for row in inside.nonzero().flatten().tolist()]
        truth = of_texts(owner[inside] - start, some)
        parts.append(recall.retrieval(image[start : start + 8], text[inside], truth))
    assert found.rsum == pytest.approx(sum(part.rsum for part in parts) / 5, abs=1e-9)


def test_the_protocol_of_the_field_counts_own_images_alone():
    image, text, owner, truth = case()
    assert by_protocol("karpathy", image, text, truth) == recall.retrieval(image, text, owner)
    assert by_protocol("full", image, text, truth) == recall.retrieval(image, text, truth)
    assert (
        by_protocol("full", image, text, truth).rsum
        > by_protocol("karpathy", image, text, truth).rsum
    )


@pytest.fixture(scope="module")
def twins():
    """Scenes of which the first six have one caption in common."""
    pairs = data.open("scenes:60")
    examples = list(pairs.examples)
    for row in range(6):
        captions = ("a shared caption", *examples[row].captions[1:])
        examples[row] = replace(examples[row], captions=captions, split="val")
    return replace(pairs, examples=tuple(examples))


def test_all_who_measure_agree(twins, tmp_path):
    """The dataset, its cache, a validation split and the answers of a bootstrap."""
    teacher = SmallTeacher()
    direct = retrieval(teacher, twins.split("val")).recall
    assert direct.shared == 6
    cache = build(teacher, twins, tmp_path / "cache")
    kept = teacher_recall(cache, cache.split("val"))
    assert kept.shared == 6
    assert kept.rsum == pytest.approx(direct.rsum, abs=1)  # float16 features
    student = small_student(cache)
    seen = CachedSplit(cache, cache.split("val"), student)
    expected = retrieval(student, twins.split("val")).recall
    assert seen.recall(student).shared == 6
    assert seen.recall(student).rsum == pytest.approx(expected.rsum, abs=1e-6)
    of_captions = chances(*seen.features(student), seen.truth)[1]
    assert 100 * float(of_captions.mean(0)[0]) == pytest.approx(expected.t2i.r1, abs=1e-6)


def test_fusion_models_and_re_ranking_agree(twins):
    val = twins.split("val")
    judge = SmallJudge()
    scored = score_matrix(judge, val)
    whole = from_scores(scored.scores, scored.truth)
    assert whole.shared == 6
    found = rerank(SmallTeacher(), judge, val, [1000])
    assert found.stages[-1].recall.rsum == pytest.approx(whole.rsum, abs=1e-9)
    assert found.stages[-1].recall.shared == 6
    assert any(note.endswith("share, each counted as true of all: 6") for note in found.notes)


def test_embedded_rows_know_their_truth(twins):
    rows = embed(SmallTeacher(), twins.split("val"))
    assert rows.truth.shared == 6
    assert torch.equal(rows.owner, rows.truth.owner)
