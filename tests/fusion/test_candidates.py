"""Which pairs are chosen: exactly what each finder promises."""

from itertools import pairwise

import numpy as np
import pytest

from crosstill.fusion import candidates
from crosstill.fusion.candidates import Rated, Rows, Wanted, choose, numbered


def rows_of(images: int, each: int = 3, splits: np.ndarray | None = None) -> Rows:
    """`each` captions an image, all of different texts."""
    owner = np.repeat(np.arange(images), each)
    if splits is None:
        splits = np.array(["train"] * images, dtype=object)
    return Rows(owner, np.arange(len(owner)), splits)


def table(rows: Rows, wanted: Wanted, find) -> np.ndarray:
    """Which pairs were chosen: bool (I, T); rows of the CSR must be ascending and distinct."""
    indptr, captions = choose(rows, wanted, find)
    assert indptr.dtype == np.int64 and captions.dtype == np.int32
    assert len(indptr) == len(rows.splits) + 1 and indptr[-1] == len(captions)
    chosen = np.zeros((len(rows.splits), len(rows.owner)), dtype=bool)
    for image in range(len(rows.splits)):
        mine = captions[indptr[image] : indptr[image + 1]]
        assert (np.diff(mine) > 0).all()
        chosen[image, mine] = True
    assert chosen[rows.owner, np.arange(len(rows.owner))].all(), "true pairs are included"
    return chosen


def false_of(rows: Rows, chosen: np.ndarray) -> np.ndarray:
    own = rows.owner == np.arange(len(rows.splits))[:, None]
    return chosen & ~own


def random_features(rows: Rows, dim: int = 6) -> Rated:
    random = np.random.default_rng(5)
    image = random.standard_normal((len(rows.splits), dim)).astype(np.float32)
    return Rated(image, random.standard_normal((len(rows.owner), dim)).astype(np.float32))


FINDS = ["random", "batch", random_features]


@pytest.fixture(params=FINDS, ids=["random", "batch", "top"])
def finder(request):
    """A finder for any rows."""
    return lambda rows: request.param(rows) if callable(request.param) else request.param


@pytest.mark.parametrize("false", [1, 5, 29, 80])
def test_images_get_as_many_false_captions_as_asked(finder, false):
    rows = rows_of(30)
    chosen = table(rows, Wanted(false, 0, seed=3), finder(rows))
    assert (false_of(rows, chosen).sum(1) == false).all()


@pytest.mark.parametrize("false", [1, 5, 29])
def test_captions_get_as_many_false_images_as_asked(finder, false):
    rows = rows_of(30)
    chosen = table(rows, Wanted(0, false, seed=3), finder(rows))
    assert (false_of(rows, chosen).sum(0) == false).all()


def test_both_sides_are_united(finder):
    rows = rows_of(30)
    both = table(rows, Wanted(4, 2, seed=1), finder(rows))
    images = table(rows, Wanted(4, 0, seed=1), finder(rows))
    captions = table(rows, Wanted(0, 2, seed=1), finder(rows))
    assert (both == images | captions).all()


def test_all_there_are_when_more_are_asked(finder):
    rows = rows_of(7)
    assert table(rows, Wanted(500, 500), finder(rows)).all()
    assert table(rows, Wanted(500, 0), finder(rows)).all()


def test_candidates_never_cross_splits(finder):
    splits = np.array(["train", "val", "train", "test", "val"] * 6, dtype=object)
    rows = rows_of(30, splits=splits)
    chosen = table(rows, Wanted(6, 4), finder(rows))
    assert not chosen[splits[:, None] != splits[rows.owner]].any()
    assert (false_of(rows, chosen).sum(1) >= 6).all()


@pytest.mark.parametrize("false", [2, 40])  # the two ways to draw
def test_captions_with_the_same_text_are_never_false(finder, false):
    # twenty texts among sixty captions: most images own a text that others own too
    names = np.random.default_rng(0).integers(20, size=60)
    rows = rows_of(20)._replace(names=names)
    chosen = false_of(rows, table(rows, Wanted(false, 3), finder(rows)))
    owned = np.zeros((20, 20), dtype=bool)
    owned[rows.owner, names] = True
    assert not (chosen & owned[:, names]).any()
    available = (~owned[:, names]).sum(1)
    assert (chosen.sum(1) >= np.minimum(false, available)).all()


def test_an_image_whose_captions_are_everyones_has_none_false(finder):
    rows = rows_of(4, each=2)._replace(names=np.array([0, 1] * 4))
    assert not false_of(rows, table(rows, Wanted(3, 3), finder(rows))).any()


@pytest.mark.parametrize("find", candidates.FINDERS)
def test_a_seed_decides_what_is_drawn(find):
    rows = rows_of(30)
    first = table(rows, Wanted(5, 3, seed=1), find)
    assert (table(rows, Wanted(5, 3, seed=1), find) == first).all()
    assert (table(rows, Wanted(5, 3, seed=2), find) != first).any()


def test_small_tables_choose_what_a_large_one_does(finder, monkeypatch):
    rows = rows_of(30)._replace(names=np.arange(90) % 50)
    find = finder(rows)
    whole = table(rows, Wanted(5, 40), find)
    monkeypatch.setattr(candidates, "ENTRIES", 100)
    small = table(rows, Wanted(5, 40), find)
    assert isinstance(find, str) or (whole == small).all()
    assert (small.sum(1) >= 8).all() and (small.sum(0) >= 29).all()


@pytest.mark.parametrize("false", [6, 60])  # sampled, and over all partners
def test_random_ones_are_uniform(false):
    rows = rows_of(40)
    counts = np.zeros((40, 120))
    for seed in range(60):
        counts += false_of(rows, table(rows, Wanted(false, 0, seed=seed), "random"))
    rate = counts.sum(0) / (60 * 39)
    expected = false / 117
    # 2340 draws each: five standard deviations
    assert np.abs(rate - expected).max() < 5 * (expected * (1 - expected) / 2340) ** 0.5


def test_a_batch_is_shared_by_its_images():
    rows = rows_of(24)
    chosen = false_of(rows, table(rows, Wanted(5, 0, seed=4), "batch"))
    partners = [frozenset(rows.owner[chosen[image]]) | {image} for image in range(24)]
    assert all(len(batch) == 6 for batch in partners)
    assert len(set(partners)) == 4  # 24 images in batches of 6
    captions = [set(np.flatnonzero(chosen[image])) for image in range(24)]
    for batch in set(partners):  # one caption of each image, the same for all others
        assert len(set().union(*(captions[image] for image in batch))) == 6


def test_the_captions_of_an_image_share_its_batch():
    rows = rows_of(24)
    chosen = false_of(rows, table(rows, Wanted(0, 3, seed=4), "batch"))
    for image in range(24):
        seen = {tuple(np.flatnonzero(chosen[:, c])) for c in np.flatnonzero(rows.owner == image)}
        assert len(seen) == 1


def test_a_short_last_batch_is_filled_from_the_first():
    rows = rows_of(10)
    chosen = false_of(rows, table(rows, Wanted(3, 0, seed=4), "batch"))
    assert (chosen.sum(1) == 3).all()
    assert all(len(set(rows.owner[chosen[image]])) == 3 for image in range(10))


def test_what_a_batch_loses_to_equal_texts_is_drawn_instead():
    rows = rows_of(12, each=1)._replace(names=np.array([0] * 6 + list(range(1, 7))))
    chosen = false_of(rows, table(rows, Wanted(5, 0), "batch"))
    assert (chosen.sum(1) == [5] * 12).all()
    assert not chosen[:6, :6].any()


def test_top_ones_are_the_highest_cosines():
    rows = rows_of(12)
    find = random_features(rows)
    find = find._replace(image=find.image * np.linspace(0.1, 9, 12, dtype=np.float32)[:, None])
    chosen = false_of(rows, table(rows, Wanted(4, 0), find))
    image = find.image / np.linalg.norm(find.image, axis=1, keepdims=True)
    text = find.text / np.linalg.norm(find.text, axis=1, keepdims=True)
    cosine = image @ text.T
    for row in range(12):
        others = np.flatnonzero(rows.owner != row)
        best = others[np.argsort(-cosine[row, others])[:4]]
        assert set(np.flatnonzero(chosen[row])) == set(best)
    chosen = false_of(rows, table(rows, Wanted(0, 2), find))
    for column in range(36):
        others = np.flatnonzero(np.arange(12) != rows.owner[column])
        best = others[np.argsort(-cosine[others, column])[:2]]
        assert set(np.flatnonzero(chosen[:, column])) == set(best)


def test_a_hand_made_case():
    # captions 0, 1 of image 0; 2 of image 1; 3, 4 of image 2, and 4 says what 0 says
    rows = Rows(
        np.array([0, 0, 1, 2, 2]), np.array([0, 1, 2, 3, 0]), np.array(["val"] * 3, dtype=object)
    )
    eye = np.eye(3, dtype=np.float32)
    text = np.array([[1, 0, 0], [1, 0, 0.1], [0, 1, 0.2], [0.3, 0, 1], [1, 0, 0]], np.float32)
    indptr, captions = choose(rows, Wanted(1, 1), Rated(eye, text))
    of = [set(captions[a:b].tolist()) for a, b in pairwise(indptr)]
    # image 0: 3 (caption 4 is also its own text); image 1: any; image 2: 2, for 0 is its own text
    assert of[0] >= {0, 1, 3} and 4 not in of[0]
    assert of[1] >= {2}
    assert of[2] >= {3, 4} and 0 not in of[2]
    # caption 0 may only go to image 1, caption 1 goes to image 2, caption 2 to image 2
    assert 0 in of[1] and 1 in of[2] and 2 in of[2] and 4 in of[1]


def test_texts_are_numbered_by_their_first_place():
    texts, names = numbered(["b", "a", "b", "c", "a"])
    assert texts == ["b", "a", "c"] and names.tolist() == [0, 1, 0, 2, 1]
