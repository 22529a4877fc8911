"""The pixels of `pixels.load`, without torch, are those of `images.load`, bit for bit."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from crosstill import images, pixels
from crosstill.errors import ImageError
from crosstill.preprocess import Preprocess

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
