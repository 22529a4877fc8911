"""Pixels decoded and resized without torch are torch's, bit for bit."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from crosstill import images, pixels
from crosstill.errors import ImageError
from crosstill.pixels import Preprocess, resize

WAYS = {
    "squash": Preprocess(size=(32, 48)),
    "bilinear": Preprocess(size=(24, 24), interpolation="bilinear"),
    "crop": Preprocess(size=(32, 32), resize="crop", shorter=40),
    "crop wider than the photo": Preprocess(size=(64, 64), resize="crop", shorter=64),
    "fit": Preprocess(size=(32, 32), resize="fit", shorter=40, longer=60, multiple=8),
}


def encoded(form, mode="RGB", size=(61, 43), **options):
    draw = np.random.default_rng(0)
    noise = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    picture = noise.resize((7, 5)).resize(size).convert(mode)
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


PHOTOS = {
    "jpeg": encoded("JPEG"),
    "grey jpeg": encoded("JPEG", "L"),
    "cmyk jpeg": encoded("JPEG", "CMYK"),
    "large": encoded("JPEG", size=(1400, 900)),
    "png": encoded("PNG"),
    "transparent": encoded("PNG", "RGBA"),
    "webp": encoded("WEBP"),
    "gif": encoded("GIF", "P"),
    "narrow": encoded("PNG", size=(3, 200)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("photo", PHOTOS)
def test_golden_pixels(photo, way):
    there, here = images.load(PHOTOS[photo], photo, WAYS[way]), None
    here = pixels.load(PHOTOS[photo], photo, WAYS[way])
    assert here.dtype == np.uint8 and here.flags.c_contiguous
    assert np.array_equal(here, there.numpy())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_golden_pixels_of_turned_photos(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded("JPEG", exif=exif)
    way = Preprocess(size=(32, 48))
    assert np.array_equal(pixels.load(data, "", way), images.load(data, "", way).numpy())


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff\xe0 nothing", b"<svg/>"])
def test_unreadable_bytes_are_refused_alike(data):
    with pytest.raises(ImageError) as here:
        pixels.load(data, "photo", WAYS["squash"])
    with pytest.raises(ImageError) as there:
        images.load(data, "photo", WAYS["squash"])
    assert str(here.value) == str(there.value)


def test_decoding_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from crosstill import pixels\n"
        "assert pixels.decode(sys.stdin.buffer.read(), '').shape == (43, 61, 3)"
    )
    subprocess.run([sys.executable, "-c", code], input=PHOTOS["png"], check=True)


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
