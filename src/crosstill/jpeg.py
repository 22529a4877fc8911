"""Decode JPEG in this process with libjpeg-turbo, and refuse what is not a whole photo.

libjpeg fills what is missing with grey and calls that a warning; here it is an error. Some
warnings are harmless (bytes between segments, an unknown revision), and a few codings are none of
simplejpeg's: those photos go to Pillow, see `decoding`, and are decoded twice, with other bytes
before the end marker. A decoder that still wanted data then gives other pixels.

The seconds and bytes that a photo takes here follow from its header, which is checked first.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image

from crosstill import decoding, rasters
from crosstill.errors import ImageError

MAX_SCANNED = 20 * rasters.MAX_PIXELS  # a progressive JPEG draws over all its pixels at every scan
MAX_SEGMENTS = 65_536  # before the pixels and between scans; cameras write a few hundred at most

_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; the rest is arithmetic or rare
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
# The next marker, stuffed bytes and restarts aside. All loops are possessive: linear in any data.
_MARKER = re.compile(
    rb"[^\xff]*+(?:\xff++[\0\x01\xd0-\xd7][^\xff]*+)*+\xff++([\x02-\xcf\xd8-\xfe])", re.DOTALL
)
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_KINDS = {1: "B", 3: "H", 4: "I"}  # of EXIF's numbers
# Entropy-coded bytes for a decoder that still wants some. They begin with ones, since libjpeg makes
# zeros of what is missing.
_MORE = bytes(range(254, 37, -3))


@dataclass
class _Frame:
    """The header of a JPEG.

    Attributes:
        coding: the marker of the frame, 0xC0 to 0xCF.
        parts: sampling factors of each component, (horizontal, vertical), by its number.
        scans: of which components, first and last coefficient, and lowest bit, each is.
    """

    width: int
    height: int
    coding: int
    parts: dict[int, tuple[int, int]]
    scans: list[tuple[list[int], int, int, int]] = field(default_factory=list)
    exif: bytes = b""
    xmp: bytes = b""

    @property
    def in_scans(self) -> bool:
        """Whether the pixels come in several scans, all held until the last."""
        first = self.scans[0][0] if self.scans else []
        return self.coding in _PROGRESSIVE or len(first) < len(self.parts)

    @property
    def memory(self) -> int:
        """Bytes that decoding takes: pixels of 4 bytes, turned, resized, and coefficients."""
        size = self.width * self.height
        widest = max(h * v for h, v in self.parts.values())
        waiting = 2 * sum(h * v for h, v in self.parts.values()) / widest if self.in_scans else 0
        return int(
            size * (5 + waiting + (4 if self.orientation > 1 or len(self.parts) == 4 else 0))
        )

    @property
    def orientation(self) -> int:
        number = _exif_orientation(self.exif)
        if number is None and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', self.xmp)):
            number = int(match[1])
        return number or 1

    def lacks(self, size: int) -> bool:
        """Tell whether a file of `size` bytes cannot hold all of the pixels."""
        if self.coding in _HUFFMAN and 8 * size < (self.width // 8) * (self.height // 8):
            return True  # every block takes a bit at least
        left = {part: [-1] * 64 for part in self.parts}
        for parts, first, last, bit in self.scans:
            last, bit = (last, bit) if self.coding in _PROGRESSIVE else (63, 0)
            for part in parts:
                left.setdefault(part, [-1] * 64)[first : last + 1] = [bit] * (last + 1 - first)
        return any(bits != [0] * 64 for bits in left.values())


@contextmanager
def decode(data: bytes, path: str) -> Iterator[np.ndarray]:
    """Decode to upright RGB, (H, W, 3), or (H, W, 4) with a filler, which torch resizes faster.

    Its memory is counted in `decoding`'s budget until the block ends.

    Raises:
        ImageError: see `pixels.decode`.
    """
    frame = _frame(data, path)
    if frame is not None:
        rasters.check_size(frame.width, frame.height, path)
        most = MAX_SCANNED // max(1, frame.width * frame.height)
        if len(frame.scans) > most:
            size = f"{frame.width} x {frame.height}"
            raise ImageError(path, f"too many scans ({len(frame.scans)} of {size})")
        if frame.lacks(len(data)):
            raise ImageError(path, "truncated")
        with decoding.memory(frame.memory, path):
            pixels = _pixels(data, frame, path)
            if pixels is not None:
                yield rasters.turned(pixels, frame.orientation)
                return
    again = _digest(_with_more(data, path), path)
    with decoding.decode(data, path) as upright:
        if hashlib.sha256(upright.data).digest() != again:
            raise ImageError(path, "truncated")
        yield upright


def _pixels(data: bytes, frame: _Frame, path: str) -> np.ndarray | None:
    """Decode without turning; None where simplejpeg cannot, or where its complaint is harmless."""
    try:
        if len(frame.parts) != 4:
            return np.asarray(simplejpeg.decode_jpeg(data, "RGBX"))
        return _without_ink(np.asarray(simplejpeg.decode_jpeg(data, "CMYK")))
    except MemoryError:
        raise ImageError(path, rasters.OVERSIZE) from None
    except ValueError as error:  # libjpeg's first complaint, warnings among them
        text = " ".join(str(error).split())
        if "remature end" in text:
            raise ImageError(path, "truncated") from None
        if text.startswith("Corrupt JPEG data") and "extraneous" not in text:
            raise ImageError(path, f"corrupt: {text.partition(': ')[2]}") from None
        return None


def _without_ink(ink: np.ndarray) -> np.ndarray:
    """CMYK, inverted as Adobe writes it, as RGB: Pillow's conversion."""
    height, width, _ = ink.shape
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 64):
        strip = ink[top : top + 64]
        size = (width, len(strip))
        image = Image.frombuffer("CMYK", size, strip.tobytes(), "raw", "CMYK;I", 0, 1)
        out[top : top + 64] = np.asarray(image.convert("RGB"))
    return out


def _digest(data: bytes, path: str) -> bytes | None:
    """Return the SHA-256 of a file's pixels by Pillow; None where it refuses them."""
    try:
        with decoding.decode(data, path) as upright:
            return hashlib.sha256(upright.data).digest()
    except ImageError as error:
        if error.reason.startswith((rasters.OVERTIME, rasters.OVERSIZE)):  # once is enough
            raise
        return None


def _with_more(data: bytes, path: str) -> bytes:
    """The file with more data before its end marker, and the restart markers that would follow."""
    ends = (start for marker, start, _ in _segments(data, path) if marker == _EOI)
    end = next(ends, len(data))
    kept = data[: end - 2].rstrip(b"\xff")
    _, last = max((kept.rfind(bytes((0xFF, 0xD0 + n))), n) for n in range(8))
    more = b"".join(_MORE + bytes((0xFF, 0xD0 + n % 8)) for n in range(last + 1, last + 17))
    return kept + more + b"\xff" + data[end - 1 :]


def _frame(data: bytes, path: str) -> _Frame | None:
    """Read a header, and those of all scans where the pixels come in several; None of a bad one."""
    frame, exif, xmp = None, b"", b""
    with suppress(IndexError, struct.error):
        for marker, start, end in _segments(data, path):
            body = data[start : min(end, start + 65_535)]
            if marker == _APP1 and body.startswith(b"Exif\0\0"):
                exif += body[6:]
            elif marker == _APP1 and body.startswith(_XMP):
                xmp = body[len(_XMP) :]
            elif marker in _FRAMES and frame is None:
                _, height, width, count = struct.unpack(">BHHB", body[:6])
                parts = {body[6 + 3 * n]: body[7 + 3 * n] for n in range(count)}
                if not 0 < count == len(parts):
                    return None
                frame = _Frame(
                    width, height, marker, {part: (v >> 4, v & 15) for part, v in parts.items()}
                )
            elif marker == _SOS and frame is not None:
                ids = [body[1 + 2 * n] for n in range(body[0])]
                first, last, bits = struct.unpack_from("BBB", body, 1 + 2 * body[0])
                frame.scans.append((ids, first, last, bits & 15))
                frame.exif, frame.xmp = exif, xmp
                if not frame.in_scans:
                    break
    sound = frame is not None and frame.scans and all(h * v for h, v in frame.parts.values())
    return frame if sound else None


def _segments(data: bytes, path: str) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of a JPEG's segments, its end marker included."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        if not (match := _MARKER.match(data, at)):
            return
        marker, start = match[1][0], match.end()
        if marker == _EOI:
            yield marker, start, start
            return
        at = start + max(2, int.from_bytes(data[start : start + 2], "big"))
        yield marker, start + 2, at
    raise ImageError(path, f"corrupt: more than {MAX_SEGMENTS} segments")


def _exif_orientation(tiff: bytes) -> int | None:
    """Read the orientation in the first directory of EXIF; None where it says nothing."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    with suppress(struct.error):
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == 0x0112 and number == 1 and kind in _KINDS:
                return struct.unpack_from(order + _KINDS[kind], tiff, entry + 8)[0]
    return None
