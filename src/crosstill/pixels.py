"""From a file's bytes to upright RGB and to a model's size, in numpy.

Training, caching, evaluation, indexing and serving all decode here, so that a teacher, its
student and the search box see the same pixels. Ordinary JPEG goes through simplejpeg
(libjpeg-turbo, full size), everything else through Pillow. `load` resizes without torch; `images`
does so with it, faster, and the pixels are equal bit for bit.

What each kind of pixel becomes:
    1, L, P, CMYK, YCbCr, LAB    Pillow's conversion to RGB
    any transparency             laid on white
    16-bit grey, I in 0..65535   divided by 257: scaled to 8 bits, never clipped
    other I, and F               stretched from its least to its greatest finite value
    animations                   the first frame
EXIF orientation is applied in every format that has it; unreadable EXIF counts as upright.
`MAX_PIXELS`, `MAX_SIDE` and `MAX_SCANNED` are checked before anything is decoded.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from crosstill import files
from crosstill.errors import ImageError
from crosstill.preprocess import Preprocess
from crosstill.resize import resize

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # what JPEG can hold; a strip of 1 x 10 million is an attack, not a picture
MAX_SCANNED = 20 * MAX_PIXELS  # a progressive JPEG draws over all its pixels at every scan
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's names; never EPS

# the beginnings of formats that people bring and that are not read here: said by name
_OTHERS = {
    "HEIC": rb"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ",
    "PSD": rb"8BPS",
    "PDF": rb"%PDF-",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg\b",
}

# what is wrong with a file, by the beginning of the reason
_CLASSES = {
    "empty file": "empty",
    "not an image": "not-an-image",
    "too many": "too-large",
    "larger than": "too-large",
    "truncated": "truncated",
    "corrupt": "damaged",
    "missing": "missing",
    "vanished": "missing",
    "changed": "changed",
    "a link to nothing": "missing",
    "cannot be read (No such file": "missing",
    "no caption": "no-caption",
    "no vector": "no-vector",
    "no image": "empty",
}
CLASSES = tuple(dict.fromkeys([*_CLASSES.values(), "unsupported-format", "unreadable"]))

# EXIF orientation → which of the axes H=0, W=1 to flip; from 5 on, after swapping the two
_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # of a JPEG, restarts aside


def decode(data: bytes, path: str) -> np.ndarray:
    """Decode a file to upright RGB: uint8 (H, W, 3).

    Raises:
        ImageError: whatever is wrong with the bytes. The reason is one of "empty file",
            "not an image", "truncated", "too many pixels (W x H)", "too many scans (S of W x H)",
            "corrupt: …" and, of formats known by name, "HEIC is not read; convert it …".
    """
    return upright(data, path)[..., :3]


def load(data: bytes, path: str, preprocess: Preprocess) -> np.ndarray:
    """Bring a file to the model's size: uint8 (3, H, W), the same pixels as `images.load`.

    Raises:
        ImageError: see `decode`; also for an image too long for its resized form.
    """
    pixels = upright(data, path)
    height, width = preprocess.sides(*pixels.shape[:2])
    check_size(width, height, path)
    resized = resize(pixels, (height, width), preprocess.interpolation)
    planes = np.moveaxis(resized, 2, 0)[:3]
    return np.ascontiguousarray(
        centre(planes, preprocess.size) if preprocess.resize == "crop" else planes
    )


def failure_class(reason: str) -> str:
    """Which of `CLASSES` a reason is of: few and fixed, for counting.

    >>> failure_class("too many pixels (50000 x 50000)")
    'too-large'
    """
    if " is not read" in reason:
        return "unsupported-format"
    found = (name for start, name in _CLASSES.items() if reason.startswith(start))
    return next(found, "unreadable")


def quarantine_row(path: str, reason: str, size_in_bytes: int) -> dict[str, Any]:
    """What quarantine.jsonl says of one image."""
    kind = failure_class(reason)
    return {"path": path, "class": kind, "reason": reason, "bytes": size_in_bytes}


class Quarantine:
    """The images that could not be used, one row each; with `strict` the first one raises."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, error: ImageError, size_in_bytes: int) -> None:
        """Note an image once, however often it is met."""
        if self.strict:
            raise error
        row = quarantine_row(error.path, error.reason, size_in_bytes)
        self._rows.setdefault(error.path, row)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """`path`, `class`, `reason` and `bytes` of each, in the order in which they were met."""
        return list(self._rows.values())

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


def upright(data: bytes, path: str) -> np.ndarray:
    """As `decode`: (H, W, 3), or (H, W, 4) with a filler, which torch resizes faster."""
    if not data:
        raise ImageError(path, "empty file")
    try:
        if data.startswith(b"\xff\xd8") and (pixels := _decode_jpeg(data, path)) is not None:
            return _turned(pixels, _jpeg_orientation(data, path))
        image = _open(data, path)
        check_size(*image.size, path)
        _check_scans(data, *image.size, path)
        image.load()
        # Only now: PNG may keep its EXIF behind the pixels, and TIFF has turned itself.
        return _turned(_rgb(image), _orientation(image))
    except ImageError:
        raise
    except Exception as error:  # far more than OSError: SyntaxError, struct.error, ...
        raise ImageError(path, _reason(error)) from error


def check_size(width: int, height: int, path: str) -> None:
    """Refuse an image that is too large, by its header or by what it would be resized to."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(path, f"too many pixels ({width} x {height})")


def centre(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut (C, *size) from the centre of (C, H, W), with black around what is smaller."""
    top, left = (-((have - want) // 2) for have, want in zip(planes.shape[1:], size, strict=True))
    bottom, right = size[0] - planes.shape[1] - top, size[1] - planes.shape[2] - left
    cut = planes[
        :,
        max(0, -top) : planes.shape[1] + min(0, bottom),
        max(0, -left) : planes.shape[2] + min(0, right),
    ]
    around = [(max(0, top), max(0, bottom)), (max(0, left), max(0, right))]
    return np.pad(cut, [(0, 0), *around])


def _decode_jpeg(data: bytes, path: str) -> np.ndarray | None:
    """(H, W, 4), or None where Pillow has to give the verdict: CMYK, and all that is damaged."""
    with suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height, path)
        _check_scans(data, width, height, path)
        if colours not in ("CMYK", "YCCK"):
            return np.asarray(simplejpeg.decode_jpeg(data, "RGBX"))
    return None


def _check_scans(data: bytes, width: int, height: int, path: str) -> None:
    """Refuse a JPEG of so many scans that decoding its few bytes would take minutes."""
    most = MAX_SCANNED // max(1, width * height)
    # the marker may stand in metadata or in a film behind the picture: only then count with care
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > most:
        scans = sum(marker == 0xDA for marker in _jpeg_markers(data))
        if scans > most:
            raise ImageError(path, f"too many scans ({scans} of {width} x {height})")


def _jpeg_markers(data: bytes) -> Iterable[int]:
    """The markers of a JPEG's segments, up to its end."""
    found = _MARKER.search(data, 2)
    while found and (marker := found[1][0]) != 0xD9:
        yield marker
        end = found.end()
        found = _MARKER.search(data, end + int.from_bytes(data[end : end + 2], "big"))


def _open(data: bytes, path: str) -> Image.Image:
    """Read a header as `Image.open` does, without its own limit: that one warns, or hides W x H."""
    Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    for name, beginning in _OTHERS.items():
        if re.match(beginning, data[:1000], re.DOTALL):
            raise ImageError(path, f"{name} is not read; convert it to JPEG or PNG")
    raise ImageError(path, "not an image")


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of any mode, by the table at the top of this file."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    finite = grey[np.isfinite(grey)] if grey.dtype.kind == "f" else grey
    low, high = float(finite.min()), float(finite.max())
    if grey.dtype.kind != "f" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    out = np.empty(grey.shape, np.uint8)
    for top in range(0, len(grey), 64):  # float64 of a whole large image would take gigabytes
        rows = grey[top : top + 64].astype(np.float64)
        rows = np.nan_to_num(rows, nan=low, posinf=high, neginf=low)
        out[top : top + 64] = ((rows - low) / ((high - low) or 1.0) * 255).round()
    return out


def _jpeg_orientation(data: bytes, path: str) -> int:
    """Ask Pillow only when there is an APP1 segment (EXIF or XMP): most photos have none."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1] not in (0xE1, 0xFF):
        if data[at + 1] == 0xDA:  # the pixels begin
            return 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return _orientation(_open(data, path))


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    flips = _FLIPS.get(orientation, ())
    pixels = pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
    # torch takes no negative strides
    return np.ascontiguousarray(np.flip(pixels, flips)) if flips else pixels


def _reason(error: Exception) -> str:
    """A short text that is the same on every run: no memory addresses, one line."""
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "file", " ".join(str(error).split()))
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too many pixels"
    early = isinstance(error.__cause__ or error, (EOFError, struct.error))
    early = early or "truncated" in text.lower()
    return "truncated" if early else f"corrupt: {text[:120] or type(error).__name__}"
