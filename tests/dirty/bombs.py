"""Twenty small files that ask for much memory or time, and what reading each of them takes.

As a script: for each file named, one line of JSON with its verdict, seconds and KiB of memory.
"""

import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from mutants import encoded, picture
from PIL import Image, PngImagePlugin

MEGA = 1 << 20


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *more: bytes, pixels: bytes = bytes(1000)) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixel = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + pixel + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, a hundred bytes, comes again and again."""
    data = encoded(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True, quality=20)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def webp(width: int, height: int) -> bytes:
    data = encoded(Image.new("RGBA", (8, 8)), "WEBP", lossless=True, xmp=b"<x/>")
    at = data.index(b"VP8X") + 12
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return data[:at] + sides + data[at + 6 :]


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + head + bytes(100)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + encoded(picture(), "GIF")[10:]


def frames(count: int) -> bytes:
    """A GIF of 32 x 24 with very many frames."""
    whole = encoded(picture().convert("P"), "GIF")
    start = whole.index(b",", 13 + 3 * 2 ** ((whole[10] & 7) + 1))
    return whole[:start] + whole[start:-1] * count + b";"


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of the tags (type, count, value); `data` lies at byte 8."""
    at = 8 + len(data)
    body = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    next_one = struct.pack("<I", at)  # the directory follows itself
    return b"II*\0" + struct.pack("<I", at) + data + struct.pack("<H", len(tags)) + body + next_one


def plain(width: int, height: int, compression: int = 1, size: int = 0) -> dict:
    """The tags of a grey image in one strip at byte 8."""
    values = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 8, 278: height}
    return {tag: (4, 1, value) for tag, value in (values | {277: 1, 279: size}).items()}


def directory(count: int) -> dict:
    """So many tags, each of which claims the same megabyte."""
    return {30_000 + tag: (7, MEGA, 8) for tag in range(count)}


@lru_cache(1)
def squeezed() -> bytes:
    """A quarter of a gigabyte of zeros, as a quarter of a megabyte."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(MEGA)) for _ in range(256)) + packer.flush()


def exif(count: int) -> bytes:
    shared = bytes(30_000)
    return tiff({30_000 + tag: (7, len(shared), 8) for tag in range(count)}, shared)


def text(size: int) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("bomb", "x" * size, zip=True)
    return encoded(picture(), "PNG", pnginfo=notes)


# refused by their header, before anything is decoded
TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "PNG 50,000 x 50,000": lambda: png(50_000, 50_000),
    "PNG just above the cap": lambda: png(10_001, 10_000),
    "PNG strip 1 x 10,000,000": lambda: png(1, 10_000_000),
    "PNG of negative sides": lambda: png(0xFFFFFFFF, 0xFFFFFFFF),
    "JPEG 65,000 x 65,000": lambda: jpeg(65_000, 65_000),
    "JPEG of 5,000 scans": lambda: scans(5_000),
    "GIF 65,000 x 65,000": lambda: gif(65_000, 65_000),
    "WebP canvas 16,000 x 16,000": lambda: webp(16_000, 16_000),
    "WebP 16,383 x 16,383": lambda: webp(16_383, 16_383),
    "BMP 60,000 x 60,000": lambda: bmp(60_000, 60_000),
    "PPM 60,000 x 60,000": lambda: b"P6 60000 60000 255\n" + bytes(100),
    "PPM of many digits": lambda: b"P5 999999999 999999999 255\n" + bytes(100),
    "TIFF 60,000 x 60,000": lambda: tiff(plain(60_000, 60_000)),
}
# refused, or read as what their header says; nothing swells
SWELLING: dict[str, Callable[[], bytes]] = {
    "GIF of 5,000 frames": lambda: frames(5_000),
    "TIFF with 30,000 tags of one megabyte": lambda: tiff(
        plain(8, 8, 1, 64) | directory(30_000), bytes(MEGA)
    ),
    "TIFF strip of 8 x 8 that inflates to 256 MB": lambda: tiff(
        plain(8, 8, 8, len(squeezed())), squeezed()
    ),
    "PNG with a text of 50 MB": lambda: text(50 * MEGA),
    "PNG with a profile of 256 MB": lambda: png(
        8, 8, chunk(b"iCCP", b"p\0\0" + squeezed()), pixels=bytes(200)
    ),
    "PNG of 8 x 8 with pixels of 256 MB": lambda: (
        png(8, 8)[:33] + chunk(b"IDAT", squeezed()) + chunk(b"IEND", b"")
    ),
    "JPEG with 2,500 EXIF tags of 30 kB": lambda: encoded(
        picture(), exif=b"Exif\0\0" + exif(2_500)
    ),
    "PNG with 30,000 EXIF tags of 30 kB": lambda: png(
        8, 8, chunk(b"eXIf", exif(30_000)), pixels=bytes(200)
    ),
}
ALL = TOO_LARGE | SWELLING


def main() -> None:
    from crosstill import pixels
    from crosstill.errors import ImageError

    pixels.decode(encoded(picture(), "PNG"), "warm")  # plugins are loaded at the first image
    for path in sys.argv[1:]:
        content = Path(path).read_bytes()
        before, began = _memory(), _seconds()
        try:
            found = "x".join(map(str, pixels.decode(content, path).shape))
        except ImageError as error:
            found = error.reason
        row = {"found": found, "seconds": _seconds() - began, "rise": _memory() - before}
        sys.stdout.write(json.dumps(row) + "\n")


def _seconds() -> float:
    """CPU time of this process and of those that decode for it: what else runs adds nothing."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def _memory() -> int:
    """The most that this process has held so far, KiB; getrusage would count its parent too."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
