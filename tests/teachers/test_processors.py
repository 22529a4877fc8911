import pytest
import torch

from crosstill import images
from crosstill.errors import ModelError
from crosstill.images import Preprocess
from crosstill.towers.processors import preprocess_from

SQUASH = {
    "do_resize": True,
    "size": {"height": 24, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
CROP = {
    **SQUASH,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 2,
}


def test_squashing() -> None:
    expected = Preprocess((24, 32), "squash", None, "bicubic", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert preprocess_from(SQUASH, "x") == expected


def test_cropping() -> None:
    read = preprocess_from(CROP, "x")
    assert (read.resize, read.shorter, read.size) == ("crop", 256, (224, 224))
    assert read.interpolation == "bilinear"


@pytest.mark.parametrize("sides", [(333, 1000), (2000, 3), (346, 346), (1, 1)])
def test_squashing_and_cropping(sides: tuple[int, int]) -> None:
    """ALIGN's, as its folder says it."""
    record = {
        **SQUASH,
        "size": {"height": 346, "width": 346},
        "do_center_crop": True,
        "crop_size": {"height": 289, "width": 289},
    }
    read = preprocess_from(record, "x")
    assert (read.resize, read.size, read.sides(*sides)) == ("crop", (289, 289), (346, 346))


VILT = {**SQUASH, "size": {"shortest_edge": 384}, "do_pad": True, "size_divisor": 32}


@pytest.mark.parametrize("pads", [True, False])
def test_fitting(pads: bool) -> None:
    read = preprocess_from({**VILT, "do_pad": pads}, "x")
    assert (read.resize, read.size) == ("fit", (384, 384))
    assert (read.shorter, read.longer, read.multiple) == (384, 639, 32)


@pytest.mark.parametrize("crop", [{"shortest_edge": 288}, {"height": 288, "width": 288}])
def test_fitting_and_cropping(crop: dict) -> None:
    record = {**VILT, "size": {"shortest_edge": 300}, "do_center_crop": True, "crop_size": crop}
    read = preprocess_from(record, "x")
    assert (read.resize, read.size) == ("crop", (288, 288))
    assert (read.shorter, read.longer, read.multiple) == (300, 499, 32)


def test_padding_that_changes_nothing() -> None:
    padded = {**SQUASH, "do_pad": True, "size_divisor": 8}
    assert preprocess_from(padded, "x") == preprocess_from(SQUASH, "x")


@pytest.mark.parametrize("normalises", [True, False])
def test_other_scales_fold_into_mean_and_std(normalises: bool) -> None:
    record = {
        **SQUASH,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "do_normalize": normalises,
    }
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = pixels / 127.5 - 1
    if normalises:
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
        expected = (expected - mean[:, None, None]) / std[:, None, None]
    ours = images.normalise(pixels, preprocess_from(record, "x"))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_pad": True}, "padding"),
        ({"do_pad": True, "size_divisor": 32}, "padding"),
        ({"do_pad": True, "size_divisor": 8, "pad_size": {"height": 40, "width": 40}}, "padding"),
        ({"max_num_patches": 256}, "NaFlex"),
        ({"resample": 1}, "resample=1"),
        ({"do_resize": False}, "any size"),
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, "longest_edge"),
        ({"do_center_crop": True, "crop_size": {"height": 20, "width": 20}}, "crop_size"),
        ({"include_top": True}, "second normalisation"),
    ],
)
def test_what_cannot_be_repeated_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        preprocess_from({**SQUASH, **change}, "some/model")
