import numpy as np
import pytest
import torch
from torch.nn import functional

from crosstill.resize import resize


def by_torch(pixels, size, interpolation):
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small = functional.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return small[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("seed", range(40))
def test_every_bit_is_torchs(interpolation, seed):
    draw = np.random.default_rng(seed)
    height, width = draw.integers(1, 900, 2)
    size = tuple(int(side) for side in draw.integers(1, 400, 2))
    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 3 == 0:  # hard edges, where the cubic overshoots
        pixels = (pixels > 127).astype(np.uint8) * 255
    given = pixels.copy()
    assert np.array_equal(
        resize(pixels, size, interpolation), by_torch(pixels, size, interpolation)
    )
    assert np.array_equal(pixels, given)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(2500, 3100), (3000, 7), (5, 4000)])
def test_large_and_narrow_photos(interpolation, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(
        resize(pixels, (96, 160), interpolation), by_torch(pixels, (96, 160), interpolation)
    )


@pytest.mark.parametrize("size", [(160, 160), (30, 224), (224, 50)])
def test_four_channels_are_resized_as_three(size):
    pixels = np.random.default_rng(0).integers(0, 256, (224, 300, 4), dtype=np.uint8)
    three = resize(pixels[..., :3], size, "bicubic")
    assert np.array_equal(resize(pixels, size, "bicubic")[..., :3], three)
    turned = pixels[:, ::-1]  # not contiguous: the other way through
    assert np.array_equal(
        resize(turned, size, "bicubic"), resize(np.ascontiguousarray(turned), size, "bicubic")
    )


def test_equal_size_is_left_alone():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(resize(pixels, (4, 4), "bicubic"), pixels)
    assert resize(pixels, (2, 4), "bicubic").shape == (2, 4, 3)
