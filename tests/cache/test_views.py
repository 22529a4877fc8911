"""Several views of an image: what they are, that they are kept, and that students replay them."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crosstill import files, images
from crosstill.cache import Cache, build, build_features, pixels
from crosstill.cache.format import VIEWS
from crosstill.errors import ConfigError, CorruptError, MismatchError
from crosstill.images import Preprocess, View
from support import SmallTeacher
from verbs import crosstill, refusal

WHOLE = View(0.0, 0.0, 1.0, 1.0, flip=False)
COLOURED = {"brightness", "contrast", "saturation"}


@pytest.fixture
def shown(scenes):
    """One image's bytes, and how it looks at 8 x 8 with a change of colours."""
    content = scenes.read(scenes.examples[0])

    def look(**colours: float) -> torch.Tensor:
        return images.load(content, "x", Preprocess(size=(8, 8)), replace(WHOLE, **colours)).int()

    return look


def test_neutral_colours_change_nothing(shown):
    plain, nearly = shown(), shown(saturation=1 + 1e-9)
    assert torch.equal(plain, nearly)


def test_colours_have_closed_forms(shown):
    plain = shown()
    assert (shown(brightness=0.5) - plain / 2).abs().max() <= 0.51
    assert (shown(contrast=0.5) - (plain + 127.5) / 2).abs().max() <= 0.51
    assert shown(contrast=0.0).unique().tolist() == [128]
    bright = (plain * 1.25).clamp(max=255)
    assert (shown(brightness=1.25) - bright).abs().max() <= 0.51
    red, green, blue = shown(saturation=0.0)
    assert torch.equal(red, green) and torch.equal(green, blue)
    luma = 0.299 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2]
    assert (red - luma).abs().max() <= 1.5
    both = (luma + 1.25 * (plain - luma)).clamp(0, 255)
    assert (shown(saturation=1.25) - both).abs().max() <= 1.5


def test_kinds_can_be_left_out_and_the_others_stay():
    every = images.draw_view("ab" * 32, 1, 0)
    crop = images.draw_view("ab" * 32, 1, 0, ["crop"])
    colour = images.draw_view("ab" * 32, 1, 0, ["colour"])
    assert astuple(crop)[:4] == astuple(every)[:4] and astuple(crop)[4:] == (False, 1, 1, 1)
    assert colour == replace(WHOLE, **{name: getattr(every, name) for name in COLOURED})
    flips = [images.draw_view(f"{n:064x}", 1, 0, ["flip"]) for n in range(50)]
    assert set(flips) == {WHOLE, replace(WHOLE, flip=True)}
    drawn = [images.draw_view(f"{n:064x}", 2, 5) for n in range(300)]
    for name in COLOURED:
        factors = [getattr(view, name) for view in drawn]
        assert 0.75 <= min(factors) < 0.77 and 1.23 < max(factors) <= 1.25


def test_what_was_seen_is_kept_and_not_drawn_again(scenes, tmp_path, monkeypatch):
    cache = build(SmallTeacher(), scenes, tmp_path / "c", views=3)
    split = cache.split("val")
    drawn = [images.draw_view(cache.image_ids[row], v, 0) for row in split.images for v in (1, 2)]
    assert [cache.view(int(row), v) for row in split.images for v in (1, 2)] == drawn
    assert cache.view(0, 0) is None
    assert pq.read_table(tmp_path / "c" / VIEWS).num_rows == 2 * len(cache.image_ids)

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(images, "draw_view", never)
    assert len(pixels(cache, split, SmallTeacher().preprocess)) == len(split.images)


def test_another_augmentation_is_another_cache(scenes, tmp_path):
    build(SmallTeacher(), scenes, tmp_path / "c", views=2, augment=("crop",))
    assert build(SmallTeacher(), scenes, tmp_path / "c", views=2, augment=("crop", "crop"))
    with pytest.raises(MismatchError, match="another augmentation"):
        build(SmallTeacher(), scenes, tmp_path / "c", views=2)
    with pytest.raises(MismatchError, match="another augmentation and another number of views"):
        build(SmallTeacher(), scenes, tmp_path / "c")


def test_one_view_is_the_photo_whatever_augments(scenes, tmp_path):
    cache = build_features(SmallTeacher(), scenes, tmp_path / "c", augment=("flip",))
    assert "augment" not in cache.header["key"] and not (tmp_path / "c" / VIEWS).exists()
    assert build(SmallTeacher(), scenes, tmp_path / "c").digest == cache.digest


def test_a_cache_that_kept_no_views_says_so(scenes, tmp_path):
    build(SmallTeacher(), scenes, tmp_path / "c", views=2)
    path = tmp_path / "c/cache.json"
    header = json.loads(path.read_text())
    del header["files"][VIEWS]
    files.write_json(path, files.sealed(header))
    with pytest.raises(CorruptError, match="build it anew"):
        Cache(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": ("crop", "color")}, "no augmentation named 'color'; did you mean 'colour'"),
        ({"augment": ()}, "augment is empty"),
    ],
)
def test_augmentations_that_cannot_be(scenes, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        build(SmallTeacher(), scenes, tmp_path / "c", views=2, **options)


def test_the_verb_takes_views_and_augmentations(tmp_path):
    out = tmp_path / "c"
    crosstill("cache", "none", "scenes:20", "--views", 3, "--augment", "crop, colour", "--out", out)
    cache = Cache(out)
    assert cache.views == 3 and cache.header["key"]["augment"] == ["colour", "crop"]
    assert not any(cache.view(row, 1).flip for row in range(20))
    wrong = ("cache", "none", "scenes:20", "--views", 2, "--out", tmp_path / "d")
    assert "no augmentation named 'hue'" in refusal(*wrong, "--augment", "hue")
    assert "no augmentation named ''" in refusal(*wrong, "--augment", "crop,,flip")
    alone = refusal("cache", "none", "scenes:20", "--augment", "crop", "--out", tmp_path / "d")
    assert "give --views 2 or more" in alone


def test_a_student_sees_the_view_of_the_row_that_it_learns_from(scenes, tmp_path):
    cache = build(SmallTeacher(), scenes, tmp_path / "c", views=3, dtype="fp32")
    split = cache.split("train")
    store = pixels(cache, split, SmallTeacher().preprocess)
    positions, views = np.arange(len(split.images)), np.arange(len(split.images)) % 3
    again = SmallTeacher().embed_images(store.take(positions, views))
    torch.testing.assert_close(again, cache.image_features(split.images, views))
