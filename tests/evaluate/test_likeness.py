import itertools

import pytest
import torch
from torch.nn import functional

from crosstill.cache import build
from crosstill.evaluate import CachedSplit
from crosstill.evaluate.likeness import LONE, describe_alike, mean_cosine, mean_cosines
from support import SmallTeacher, small_student


def slow_mean(rows, owner):
    """Every cosine by itself."""
    pairs = [p for p in itertools.permutations(range(len(rows)), 2) if owner[p[0]] != owner[p[1]]]
    cosines = [functional.cosine_similarity(rows[i], rows[j], dim=0) for i, j in pairs]
    return float(torch.stack(cosines).mean())


@pytest.mark.parametrize("owner", [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 3, 3, 9, 2]])
def test_the_closed_form_is_the_mean_of_all_cosines(owner):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double() + 0.4
    assert mean_cosine(rows, torch.tensor(owner)) == pytest.approx(slow_mean(rows, owner))


def test_known_means():
    same = torch.ones(4, 3)
    assert mean_cosine(same) == pytest.approx(1)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0)
    assert mean_cosine(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-1)
    # two captions of one image are alike by right: only those of other images count
    captions = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert mean_cosine(captions, torch.tensor([5, 5, 7, 7])) == pytest.approx(0)
    # loose texts have no image, and are all different
    assert mean_cosine(captions, torch.tensor([5, 5, -1, -1])) == pytest.approx(1 / 5)


def test_a_single_image_has_no_mean():
    assert mean_cosine(torch.ones(1, 3)) is None
    owner = torch.tensor([0, 0])
    assert mean_cosines({"image": torch.ones(1, 3), "text": torch.ones(2, 3)}, owner) == {}


@pytest.mark.parametrize(
    ("student", "teacher", "alike"),
    [
        (0.74, 0.5, False),  # CLIP's rows share a mean vector
        (0.76, 0.5, True),
        (0.49, 0.0, False),  # a centred teacher
        (0.51, -0.01, True),
        (LONE - 0.01, None, False),
        (LONE + 0.01, None, True),
    ],
)
def test_alike_is_more_than_halfway_from_the_teachers_to_1(student, teacher, alike):
    beside = {} if teacher is None else {"text": teacher}
    words = describe_alike({"text": student}, beside)
    assert (words is not None) == alike
    if words:
        assert "captions" in words and f"{student:.2f}" in words


def test_a_cache_of_images_gives_the_teachers_photos_alone(scenes, tmp_path):
    class Blind(SmallTeacher):
        modalities = frozenset({"image"})

    cache = build(Blind(), scenes, tmp_path / "cache")
    student = small_student(cache)
    split = CachedSplit(cache, cache.split("val"), student)
    assert split.teacher_cosines().keys() == {"image"}
    assert split.measure(student).cosines.keys() == {"image", "text"}
