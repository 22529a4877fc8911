"""Several queries in one pass: each gets what it would get alone."""

import numpy as np
import pytest

from crosstill.errors import ConfigError
from crosstill.search.searcher import MAX_TOP, Hit, combine
from crosstill.search.serve.service import NoSuchPhotoError, Query, answer

# four photos on a circle, 0, 30, 90 and 180 degrees from the first
ANGLES = {"a": 0, "b": 30, "c": 90, "d": 180}
PHOTOS = {
    key: np.array([np.cos(angle), np.sin(angle)], np.float32)
    for key, angle in ((key, np.radians(degrees)) for key, degrees in ANGLES.items())
}


class Circle:
    """A searcher; its words are numbers of degrees."""

    generation = 7

    def __init__(self):
        self.passes, self.searches = [], []

    def encode_texts(self, texts):
        self.passes.append(list(texts))
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def notes(self, text):
        return ["no angle"] if float(text or 0) > 360 else []

    def vector(self, photo_id):
        return PHOTOS.get(photo_id)

    def find(self, vectors, top):
        self.searches.append((len(vectors), top))
        scored = [
            sorted(((float(v @ p), k) for k, p in PHOTOS.items()), reverse=True)[:top]
            for v in vectors
        ]
        return [[Hit(key, score, key, "") for score, key in row] for row in scored]


def query(words="", photo=None, like="", top=2, threshold=None):
    return Query(words, photo, like, top, threshold)


def ids(found):
    assert found.generation == 7
    return [hit.id for hit in found.hits]


def test_all_words_share_a_pass_and_equal_depths_a_search():
    circle = Circle()
    found = answer(circle, [query("0"), query("90"), query("180", top=3), query("30")])
    assert [ids(one) for one in found] == [["a", "b"], ["c", "b"], ["d", "c", "b"], ["b", "a"]]
    assert circle.passes == [["0", "90", "180", "30"]]
    assert sorted(circle.searches) == [(1, 3), (3, 2)]


def test_photos_and_words_are_added():
    circle = Circle()
    found = answer(circle, [query("90", PHOTOS["a"], top=1), query("", PHOTOS["c"], top=1)])
    assert [ids(one) for one in found] == [["b"], ["c"]]
    assert circle.passes == [["90"]]
    middle = combine(PHOTOS["a"], PHOTOS["c"])
    assert found[0].hits[0].score == pytest.approx(float(middle @ PHOTOS["b"]))


def test_a_photo_is_not_like_itself():
    found = answer(Circle(), [query(like="a"), query("90", like="a"), query(like="c", top=9)])
    assert [ids(one) for one in found] == [["b", "c"], ["b", "c"], ["b", "d", "a"]]


def test_the_deepest_question_stays_possible():
    circle = Circle()
    answer(circle, [query(like="a", top=MAX_TOP), query("0", top=MAX_TOP)])
    assert circle.searches == [(2, MAX_TOP)]


def test_an_impossible_query_leaves_the_others_alone():
    asked = [query("0"), query(like="z"), query("180", PHOTOS["a"]), query("90")]
    found = answer(Circle(), asked)
    assert isinstance(found[1], NoSuchPhotoError)
    assert isinstance(found[2], ConfigError) and "cancel" in str(found[2])
    assert [ids(found[0]), ids(found[3])] == [["a", "b"], ["c", "b"]]


def test_none_of_them_may_be_possible():
    circle = Circle()
    assert isinstance(answer(circle, [query(like="z")])[0], NoSuchPhotoError)
    assert circle.passes == circle.searches == []


def test_a_threshold_is_each_querys_own():
    found = answer(
        Circle(),
        [
            query("0", top=4, threshold=0.5),
            query("0", top=4, threshold=1.5),
            query("0", top=4, threshold=-1),
            query("0", top=4),
        ],
    )
    assert [ids(one) for one in found] == [["a", "b"], [], list("abcd"), list("abcd")]
