"""A JPEG that lacks a part is refused, however it ends; a whole one with oddities is read."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from mutants import encoded, picture
from PIL import Image

from crosstill import pixels
from crosstill.errors import ImageError

END = b"\xff\xd9"
LARGE = picture(size=(200, 150))


def odd(data: bytes) -> bytes:
    """A revision that libjpeg does not know: it warns of it first, and then of nothing else."""
    at = data.index(b"JFIF") + 5
    return data[:at] + b"\x02" + data[at + 1 :]


CODINGS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded(LARGE),
    "4:4:4": lambda: encoded(LARGE, subsampling=0, optimize=True),
    "progressive": lambda: encoded(LARGE, progressive=True),
    "grey": lambda: encoded(LARGE.convert("L")),
    "grey, progressive": lambda: encoded(LARGE.convert("L"), progressive=True),
    "CMYK": lambda: encoded(LARGE.convert("CMYK")),
    "CMYK, progressive": lambda: encoded(LARGE.convert("CMYK"), progressive=True),
    "restart markers": lambda: encoded(LARGE, restart_marker_rows=1),
    "many restart markers": lambda: encoded(LARGE, restart_marker_blocks=2),
    "restart markers, progressive": lambda: encoded(LARGE, progressive=True, restart_marker_rows=1),
    "odd": lambda: odd(encoded(LARGE)),
    "odd, grey": lambda: odd(encoded(LARGE.convert("L"))),
    "odd, progressive": lambda: odd(encoded(LARGE, progressive=True)),
    "odd, restart markers": lambda: odd(encoded(LARGE, restart_marker_rows=1)),
    "odd, many restart markers": lambda: odd(encoded(LARGE, restart_marker_blocks=2)),
}


def reason(data: bytes) -> str:
    try:
        pixels.decode(data, "photo")
    except ImageError as error:
        return error.reason
    return ""


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_jpeg_that_was_cut_and_closed_is_refused(count):
    draw, whole = random.Random(3), {name: make() for name, make in CODINGS.items()}
    accepted = []
    for number in range(count):
        name = list(CODINGS)[number % len(CODINGS)]
        at = draw.randrange(2, len(whole[name]) - 2)
        said = reason(whole[name][:at] + END)
        if not said.startswith(("truncated", "corrupt")):
            accepted.append((name, at, len(whole[name]), said))
    assert not accepted


@pytest.mark.parametrize("name", CODINGS)
def test_the_last_byte_counts(name):
    whole = CODINGS[name]()
    assert reason(whole) == ""
    assert reason(whole[:-3] + END) == "truncated"
    assert reason(whole[:-2]) == "truncated"


@pytest.mark.parametrize("name", [name for name in CODINGS if "progressive" in name])
def test_a_progressive_jpeg_that_lacks_whole_scans_is_refused(name):
    whole = CODINGS[name]()
    starts = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    assert len(starts) > 3
    assert {reason(whole[:at] + END) for at in starts[1:]} == {"truncated"}


@pytest.mark.parametrize("name", CODINGS)
def test_a_whole_jpeg_with_oddities_is_read(name):
    whole = CODINGS[name]()
    plain = pixels.decode(whole, "photo")
    at = whole.index(b"\xff\xda")
    for other in (
        whole + b"a film behind the photo" * 99 + b"\xff\xda\xff",
        whole[:-2] + bytes(9) + END,  # filled up
        whole[:at] + b"\xff" * 9 + whole[at:],
        whole[:at] + b"junk" + whole[at:],
        whole[:2] + b"\xff\xe5\0\4\xff\xff" + whole[2:],  # a segment that ends like a marker
    ):
        assert np.array_equal(pixels.decode(other, "photo"), plain)


def test_a_file_too_short_for_its_pixels_claims_no_memory(monkeypatch):
    data = bytearray(encoded(picture(), progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = bytes.fromhex("27102710")  # 10,000 x 10,000
    monkeypatch.setattr(pixels.decoding, "memory", None)
    assert reason(bytes(data[: at + 400]) + END) == "truncated"
    assert len(data) < 2_000


def test_real_photos_are_read_as_before(shared):
    for path in sorted((shared / "flickr8k/images").iterdir())[:200]:
        data = path.read_bytes()
        found = pixels.decode(data, path.name)
        assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert reason(data[: len(data) // 2] + END) == "truncated"
