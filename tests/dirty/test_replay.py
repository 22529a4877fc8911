"""A student sees the very pixels that its teacher saw, in another process."""

import subprocess
import sys

import numpy as np
import pytest
import replayed
import torch

from crosstill import cache, images
from crosstill.types import Example

VIEWS = 8


@pytest.fixture(
    scope="module",
    params=[pytest.param(16, id="here"), pytest.param(125, id="process", marks=pytest.mark.slow)],
)
def shown(request, tmp_path_factory):
    """The cache of so many scenes, and what the teacher was shown: uint8 (scenes * 8, 3, 24, 20).

    The thousand samples of the larger one are made by another process.
    """
    folder = tmp_path_factory.mktemp("replay")
    words = [str(request.param), str(folder / "cache"), str(VIEWS), str(folder / "shown.npy")]
    if request.param == 125:
        subprocess.run([sys.executable, replayed.__file__, *words], check=True)
    else:
        replayed.main(*words)
    return cache.Cache(folder / "cache"), torch.from_numpy(np.load(folder / "shown.npy"))


def test_all_samples_are_equal_to_the_last_bit(shown):
    opened, teacher = shown
    assert len(teacher) == VIEWS * len(opened.image_ids)
    samples = 0
    for name in ("train", "val", "test"):
        split = opened.split(name)
        store = cache.pixels(opened, split, images.Preprocess(size=(24, 20)))
        for view in range(VIEWS):
            student = store.take(np.arange(len(split.images)), view)
            assert torch.equal(student, teacher[split.images * VIEWS + view])
            samples += len(student)
    assert samples == len(teacher)


def test_the_views_of_an_image_differ(shown):
    opened, teacher = shown
    by_image = teacher.view(len(opened.image_ids), VIEWS, -1)
    for one in range(VIEWS):
        for other in range(one):
            assert not (by_image[:, one] == by_image[:, other]).all(dim=1).any()


def test_a_student_of_another_size_sees_the_same_places(shown):
    """The view is of the photo, not of the teacher's size: shrunk alike, both are alike."""
    opened, teacher = shown
    split = opened.split("val")
    store = cache.pixels(opened, split, images.Preprocess(size=(48, 40)))
    for view in range(VIEWS):
        large = store.take(np.arange(len(split.images)), view).float()
        small = torch.nn.functional.adaptive_avg_pool2d(large, (6, 5))
        wanted = teacher[split.images * VIEWS + view].float()
        wanted = torch.nn.functional.adaptive_avg_pool2d(wanted, (6, 5))
        assert (small - wanted).abs().mean() < 2


def test_the_first_view_is_the_plain_photo(shown):
    opened, teacher = shown
    for row in range(0, len(opened.image_ids), 5):
        content = opened.read(Example(opened.image_ids[row], opened.paths[row], (), "train"))
        plain = images.load(content, "", images.Preprocess(size=(24, 20)))
        assert torch.equal(teacher[row * VIEWS], plain)
