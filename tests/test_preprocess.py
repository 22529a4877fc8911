import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers import BridgeTowerImageProcessorPil, ViltImageProcessorPil

from crosstill import images
from crosstill.errors import ConfigError, ImageError
from crosstill.images import Preprocess, View
from crosstill.towers.processors import preprocess_from

SHAPES = [
    (480, 640),
    (640, 480),
    (333, 500),
    (375, 375),
    (97, 120),
    (90, 700),
    (1024, 100),
    (31, 33),
]


def photo(height: int, width: int) -> Image.Image:
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check_equal(processor: ViltImageProcessorPil, shape: tuple[int, int]) -> tuple[int, ...]:
    """Our pixels against those of transformers, less a rounding."""
    preprocess = preprocess_from(processor.to_dict(), "x")
    image = photo(*shape)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    pixels = images.load(encoded(image), "x.png", preprocess)
    assert pixels.shape == expected.shape
    ours = images.normalise(pixels[None], preprocess)[0].numpy()
    assert abs(ours - expected).mean() * 255 * min(preprocess.std) < 0.5
    return tuple(pixels.shape[1:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("shorter", "multiple"), [(384, 32), (96, 8), (100, 16)])
def test_fit_agrees_with_vilt_of_transformers(
    shape: tuple[int, int], shorter: int, multiple: int
) -> None:
    size = {"size": {"shortest_edge": shorter}, "size_divisor": multiple}
    height, width = check_equal(ViltImageProcessorPil(**size), shape)
    assert height % multiple == width % multiple == 0
    assert max(height, width) <= int(1333 / 800 * shorter)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_agrees_with_bridgetower_of_transformers(shape: tuple[int, int]) -> None:
    assert check_equal(BridgeTowerImageProcessorPil(), shape) == (288, 288)


def test_every_size_is_that_of_vilt() -> None:
    processor = ViltImageProcessorPil(size={"shortest_edge": 48}, size_divisor=8)
    preprocess = preprocess_from(processor.to_dict(), "x")
    draw = np.random.default_rng(0)
    for height, width in draw.integers(20, 160, (300, 2)).tolist():
        if max(height, width) < 8 * min(height, width):
            values = processor(np.zeros((height, width, 3), np.uint8), return_tensors="np")
            assert preprocess.sides(height, width) == values["pixel_values"].shape[2:]


def test_a_strip_keeps_one_multiple() -> None:
    fit = Preprocess((384, 384), "fit", longer=639, multiple=32)
    assert fit.sides(4000, 100) == (608, 32)
    assert fit.sides(10, 65_000) == (32, 608)
    with pytest.raises(ImageError, match="too many pixels"):
        images.load(encoded(Image.new("L", (60_000, 2))), "x", Preprocess((224, 224), "fit"))


def test_a_view_is_squashed_to_one_size() -> None:
    fit, whole = Preprocess((32, 32), "fit", multiple=8), View(0, 0, 1, 1, flip=False)
    data = encoded(photo(60, 90))
    assert images.load(data, "x", fit).shape == (3, 32, 48)
    assert images.load(data, "x", fit, whole).shape == (3, 32, 32)


def test_digests_of_old_values_never_change() -> None:
    """Caches on disk are found by them."""
    crop = Preprocess((160, 128), "crop", 180, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocess().digest()[:16] == "15163ae3079b37ba"
    assert crop.digest()[:16] == "c75222fc2520cedb"
    assert not {"longer", "multiple"} & (crop.to_json().keys() | Preprocess().to_json().keys())


def test_new_values_survive_json_and_tell_digests_apart() -> None:
    fits = [
        Preprocess((384, 384), "fit"),
        Preprocess((384, 384), "fit", longer=639),
        Preprocess((384, 384), "fit", longer=639, multiple=32),
        Preprocess((384, 384), "crop", longer=639, multiple=32),
    ]
    assert [Preprocess.from_json(json.loads(json.dumps(fit.to_json()))) for fit in fits] == fits
    assert len({fit.digest() for fit in fits}) == len(fits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"longer": 300},
        {"multiple": 2},
        {"resize": "fit", "longer": 200},
        {"resize": "fit", "multiple": 0},
        {"resize": "fit", "multiple": 300},
        {"resize": "fit", "shorter": 100},
    ],
    ids=str,
)
def test_impossible_bounds_name_the_key(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"preprocess {list(wrong)[-1]}"):
        Preprocess.from_json(wrong)
