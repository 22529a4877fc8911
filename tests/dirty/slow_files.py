"""Small files that keep Python's or Pillow's loops busy: minutes each, if nobody stops them."""

import struct
from collections.abc import Callable

import bombs
from mutants import encoded, picture

MEGA = 1_000_000


def rle_bmp() -> bytes:
    """10,000 x 10,000 pixels, of which each escape fills thousands through Python."""
    body = b"\0\2\xff\xff" * 1_700 + b"\0\1"
    sides = struct.pack("<IiiHHIIiiII", 40, 10_000, 10_000, 1, 8, 1, len(body), 0, 0, 256, 0)
    start = 54 + 1024
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + sides + bytes(1024) + body


def strips(count: int) -> bytes:
    """A TIFF of so many strips, each one byte."""
    tags = bombs.plain(8, count) | {273: (4, count, 8), 279: (4, count, 8), 278: (4, 1, 1)}
    return bombs.tiff(tags | {257: (4, 1, min(count, 60_000))}, bytes(4 * count))


def filled(data: bytes, more: bytes) -> bytes:
    return data[:2] + more + data[2:]


def commented_gif() -> bytes:
    whole = encoded(picture().convert("P"), "GIF")
    behind = 13 + 3 * 2 ** ((whole[10] & 7) + 1)
    return whole[:behind] + b"\x21\xfe" + b"\x01a" * (5 * MEGA) + b"\0" + whole[behind:]


# by name: the file, and what may come of it
FILES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "BMP of run lengths": (rle_bmp, ("", "takes too long")),
    "PPM with a comment of 30 MB": (
        lambda: b"P6\n#" + b"a" * (30 * MEGA) + b"\n8 8 255\n" + bytes(192),
        ("takes too long",),
    ),
    "PPM with a million comments": (
        lambda: b"P3\n8 8\n255\n" + b"# a\n" * MEGA + b"1 " * 192,
        ("takes too long",),
    ),
    "TIFF of five million strips": (lambda: strips(5 * MEGA), ("takes too long", "too much")),
    "PNG of a million chunks": (
        lambda: bombs.png(8, 8, bombs.chunk(b"abCd", b"") * MEGA, pixels=bytes(200)),
        ("takes too long",),
    ),
    "GIF with a comment of five million parts": (
        commented_gif,
        ("", "takes too long", "too much", "corrupt"),
    ),
    "JPEG with 20 MB of filling": (
        lambda: filled(encoded(picture()), b"\xff" * (20 * MEGA)),
        ("",),
    ),
    "JPEG with 20 MB of filling before nothing": (
        lambda: filled(encoded(picture()), b"\xff" * (20 * MEGA) + b"\0"),
        ("takes too long", "corrupt"),
    ),
    "JPEG of five million segments": (
        lambda: filled(encoded(picture()), b"\xff\xe5\0\2" * (5 * MEGA)),
        ("corrupt: more than",),
    ),
    "comments that might begin an SVG": (lambda: b"<!---->" * 140 + b"x", ("not an image",)),
}
