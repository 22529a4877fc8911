"""One path from a file's bytes to pixels: bytes → upright RGB → resized → normalised.

Training, caching, evaluation and serving all decode here, so that a teacher and its student
see the same pixels. Ordinary JPEG goes through simplejpeg (libjpeg-turbo, full size), everything
else through Pillow; both are resized by torch's antialiased filter, which matches Pillow's.

What each kind of pixel becomes:
    1, L, P, CMYK, YCbCr, LAB    Pillow's conversion to RGB
    any transparency             laid on white
    16-bit grey, I in 0..65535   divided by 257: scaled to 8 bits, never clipped
    other I, and F               stretched from its least to its greatest finite value
    animations                   the first frame
EXIF orientation is applied in every format that has it; unreadable EXIF counts as upright.
`MAX_PIXELS` and `MAX_SIDE` are checked on the header, before anything is decoded.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional

from crosstill import files
from crosstill.errors import ImageError
from crosstill.preprocess import Preprocess

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # what JPEG can hold; a strip of 1 x 10 million is an attack, not a picture
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's names; never EPS

# EXIF orientation → which of the axes H=0, W=1 to flip; from 5 on, after swapping the two
_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}


@dataclass(frozen=True, slots=True)
class View:
    """A crop of the upright image, in fractions of its height and width, perhaps mirrored."""

    top: float
    left: float
    height: float
    width: float
    flip: bool


def draw_view(image_id: str, view: int, seed: int) -> View | None:
    """The seeded random resized crop number `view` of an image; view 0 is the plain image: None.

    A pure function. Area 0.5 to 1, ratio 3/4 to 4/3 of the image's own, mirrored every other time.
    """
    if view == 0:
        return None
    draw = random.Random(f"{image_id}:{view}:{seed}")
    area = draw.uniform(0.5, 1.0)
    # The bounds keep both sides within the image, so that nothing is drawn twice or clamped.
    ratio = draw.uniform(max(3 / 4, area), min(4 / 3, 1 / area))
    height, width = (area / ratio) ** 0.5, (area * ratio) ** 0.5
    top, left = draw.uniform(0, 1 - height), draw.uniform(0, 1 - width)
    return View(top, left, height, width, flip=draw.random() < 0.5)


def decode(data: bytes, path: str) -> Tensor:
    """Decode a file to upright RGB: uint8 (H, W, 3).

    Raises:
        ImageError: whatever is wrong with the bytes. The reason is one of "empty file",
            "not an image", "truncated", "too many pixels (W x H)" and "corrupt: …".
    """
    return _decode(data, path)[..., :3]


def load(data: bytes, path: str, preprocess: Preprocess, view: View | None = None) -> Tensor:
    """Bring a file, or a view of it, squashed, to the model's size: uint8 (3, H, W).

    Raises:
        ImageError: see `decode`; also for an image too long for its resized form.
    """
    pixels = _decode(data, path)
    if view is not None:
        return _resize(_cut(pixels, view), preprocess.size, preprocess.interpolation)
    height, width = preprocess.sides(*pixels.shape[:2])
    _check_size(width, height, path)
    resized = _resize(pixels, (height, width), preprocess.interpolation)
    return _centre(resized, preprocess.size) if preprocess.resize == "crop" else resized


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """(pixels / 255 - mean) / std: uint8 (B, 3, H, W) → float32 (B, 3, H, W)."""
    mean, std = torch.tensor((preprocess.mean, preprocess.std)).view(2, 3, 1, 1).to(pixels.device)
    return (pixels.float() / 255 - mean) / std


class Quarantine:
    """The images that could not be used, one row each; with `strict` the first one raises."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._rows: dict[str, dict[str, Any]] = {}

    def add(self, error: ImageError, size_in_bytes: int) -> None:
        """Note an image once, however often it is met."""
        if self.strict:
            raise error
        row = {"path": error.path, "reason": error.reason, "bytes": size_in_bytes}
        self._rows.setdefault(error.path, row)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """`path`, `reason` and `bytes` of each, in the order in which they were met."""
        return list(self._rows.values())

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        files.write_bytes(path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


def _decode(data: bytes, path: str) -> Tensor:
    """(H, W, 3), or (H, W, 4) with a filler behind RGB: see `_resize`."""
    if not data:
        raise ImageError(path, "empty file")
    try:
        if data.startswith(b"\xff\xd8") and (pixels := _decode_jpeg(data, path)) is not None:
            return _upright(pixels, _jpeg_orientation(data, path))
        image = _open(data, path)
        _check_size(*image.size, path)
        image.load()
        # Only now: PNG may keep its EXIF behind the pixels, and TIFF has turned itself.
        return _upright(torch.from_numpy(_rgb(image)), _orientation(image))
    except ImageError:
        raise
    except Exception as error:  # far more than OSError: SyntaxError, struct.error, ...
        raise ImageError(path, _reason(error)) from error


def _decode_jpeg(data: bytes, path: str) -> Tensor | None:
    """(H, W, 4), or None where Pillow has to give the verdict: CMYK, and all that is damaged."""
    with suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, path)
        if colours not in ("CMYK", "YCCK"):
            return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGBX"))
    return None


def _open(data: bytes, path: str) -> Image.Image:
    """Read a header as `Image.open` does, without its own limit: that one warns, or hides W x H."""
    Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    raise ImageError(path, "not an image")


def _check_size(width: int, height: int, path: str) -> None:
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(path, f"too many pixels ({width} x {height})")


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of any mode, by the table at the top of this file."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    finite = grey[np.isfinite(grey)]
    low, high = float(finite.min()), float(finite.max())
    if grey.dtype.kind != "f" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    values = np.nan_to_num(grey.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((values - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)


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


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    flips = _FLIPS.get(orientation, ())
    pixels = pixels.transpose(0, 1) if orientation in (5, 6, 7, 8) else pixels
    return pixels.flip(flips) if flips else pixels


def _cut(pixels: Tensor, view: View) -> Tensor:
    height, width, _ = pixels.shape
    rows, columns = max(1, round(view.height * height)), max(1, round(view.width * width))
    top = min(round(view.top * height), height - rows)
    left = min(round(view.left * width), width - columns)
    cut = pixels[top : top + rows, left : left + columns]
    return cut.flip(1) if view.flip else cut


def _centre(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (3, *size) from the centre of (3, H, W), with black around what is smaller."""
    top, left = (-((have - want) // 2) for have, want in zip(pixels.shape[1:], size, strict=True))
    bottom, right = size[0] - pixels.shape[1] - top, size[1] - pixels.shape[2] - left
    return functional.pad(pixels, (left, right, top, bottom))  # a negative padding cuts


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """(H, W, 3 or 4) → (3, *size), by torch's uint8 kernel: fastest on four channels, kept last."""
    # The axis of one goes in front first: only then does torch see the layout in the strides.
    planes = pixels[None].permute(0, 3, 1, 2)
    if tuple(pixels.shape[:2]) != size:
        planes = functional.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return planes[0, :3]


def _reason(error: Exception) -> str:
    """A short text that is the same on every run: no memory addresses, one line."""
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "file", " ".join(str(error).split()))
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too many pixels"
    early = isinstance(error.__cause__ or error, (EOFError, struct.error))
    early = early or "truncated" in text.lower()
    return "truncated" if early else f"corrupt: {text[:120] or type(error).__name__}"
