"""Pillow's formats: from a file's bytes to upright RGB, strip by strip.

`decoding` runs this in worker processes of its own, where its time and memory have bounds: many of
Pillow's parsers are Python loops over what a file claims.

What each kind of pixel becomes:
    1, L, P, CMYK, YCbCr, LAB    Pillow's conversion to RGB
    any transparency             laid on white
    16-bit grey, I in 0..65535   divided by 257: scaled to 8 bits, never clipped
    other I, and F               stretched from its least to its greatest finite value
    animations                   the first frame
EXIF orientation is applied in every format that has it; unreadable EXIF counts as upright.
"""

import io
import json
import math
import mmap
import os
import re
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from crosstill.errors import ImageError

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535  # what JPEG can hold; a strip of 1 x 10 million is an attack, not a picture
SECONDS = 2.0  # of CPU time for any photo's header, and again for its pixels,
MORE_TIME = 25_000_000  # and a second more for so many pixels, and for so many bytes of the file
SPARE = 192 << 20  # bytes that decoding may take besides `Raster.memory`
OVERTIME = "takes too long to decode"
OVERSIZE = "too much memory"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's names; never EPS

# the beginnings of formats that people bring and that are not read here: said by name
_OTHERS = {
    "HEIC": rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    "AVIF": rb"....ftypavi[fs]",
    "CR3": rb"....ftypcrx ",
    "CR2": rb"II\*\0....CR",
    "CRW": rb"II....HEAPCCDR",
    "RAF": rb"FUJIFILM",
    "ORF": rb"IIR[OS]|MMOR",
    "RW2": rb"IIU\0",
    "X3F": rb"FOVb",
    "MRW": rb"\0MRM",
    "IIQ": rb"(II\*\0|MM\0\*)....(IIII|MMMM)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ",
    "PSD": rb"8BPS",
    "PDF": rb"%PDF-",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    # without a way back, or a thousand bytes of comments take years
    "SVG": rb"(?>\s*)(?>(<\?xml[^>]*>\s*)?)(?>(<!--.*?-->\s*)*)(<!DOCTYPE svg[^>]*>\s*)?<svg\b",
}

# of TIFF directories: tags, and what only the pixels of a camera's sensor have, as (tag, value)
_DNG_VERSION, _MAKER, _MORE_DIRECTORIES, _PHOTOMETRIC, _COMPRESSION = 50706, 271, 330, 262, 259
_SENSORS = {(_PHOTOMETRIC, 32803), (_PHOTOMETRIC, 34892)} | {
    (_COMPRESSION, kind) for kind in (32767, 32769, 32770, 34713, 65535)
}
_MAKERS = {
    b"nikon": "NEF",
    b"sony": "ARW",
    b"pentax": "PEF",
    b"ricoh": "PEF",
    b"samsung": "SRW",
    b"hasselblad": "3FR",
    b"phase one": "IIQ",
    b"leaf": "IIQ",
    b"canon": "CR2",
}

# EXIF orientation → which of the axes H=0, W=1 to flip; from 5 on, after swapping the two
_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}

# bytes that Pillow holds of a pixel of each mode; 4 of all others
_MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
# bytes a pixel that a decoder holds besides, as measured
_DECODERS = {"JPEG": 8, "MPO": 8, "WEBP": 16, "TIFF": 8, "GIF": 8, "BMP": 4, "PPM": 4}
_STRIP = 1 << 20  # pixels that are converted at a time


class Raster:
    """An image whose header has been read, and nothing else.

    Args:
        data: the file.

    Raises:
        ImageError: no image, a format that is not read, or too many pixels; the path is "".
        Exception: anything that Pillow raises of a bad header.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._form = data, _form(data)
        self._image: Image.Image | None = None
        if (
            self._form == "WEBP"
        ):  # whose decoder takes memory for all pixels before it says how many
            size, mode = _webp_size(data), "RGBA"
        else:
            self._image = _opened(data, self._form)
            size, mode = self._image.size, self._image.mode
        check_size(*size, "")
        pixels = size[0] * size[1]
        held = 3 + _MODES.get(mode, 4) + _DECODERS.get(self._form, 0)
        self.memory = pixels * held + 2 * len(data)  # bytes that decoding takes at most
        self.seconds = SECONDS + (pixels + len(data)) / MORE_TIME  # of CPU time, at most

    def write(self, new_array: Callable[[tuple[int, int, int]], np.ndarray]) -> None:
        """Decode into the uint8 array (H, W, 3) that `new_array` makes of its shape.

        Raises:
            Exception: anything that Pillow raises of bad pixels.
        """
        image = self._image or _opened(self._data, self._form)
        image.load()
        # Only now: PNG may keep its EXIF behind the pixels, and TIFF has turned itself.
        orientation = 1
        with suppress(Exception):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = image.size
        swapped = orientation in (5, 6, 7, 8)
        out = new_array((width, height, 3) if swapped else (height, width, 3))
        lying = np.flip(out, _FLIPS.get(orientation, ()))
        lying = lying.swapaxes(0, 1) if swapped else lying
        top = 0
        for rows in _rgb(image):
            lying[top : top + len(rows)] = rows
            top += len(rows)


def check_size(width: int, height: int, path: str) -> None:
    """Refuse an image that is too large, by its header or by what it would be resized to."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(path, f"too many pixels ({width} x {height})")


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, C) as EXIF's orientation asks."""
    flips = _FLIPS.get(orientation, ())
    pixels = pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels
    # torch takes no negative strides
    return np.ascontiguousarray(np.flip(pixels, flips)) if flips else pixels


def reason(error: Exception) -> str:
    """Say what is wrong with an image: one short line that is the same on every run."""
    if isinstance(error, ImageError):
        return error.reason
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "file", " ".join(str(error).split()))
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too many pixels"
    early = isinstance(error.__cause__ or error, (EOFError, struct.error))
    early = early or "truncated" in text.lower()
    return "truncated" if early else f"corrupt: {text[:120] or type(error).__name__}"


def _form(data: bytes) -> str:
    """Tell by its beginning which of `FORMATS` a file is."""
    Image.init()
    for name, beginning in _OTHERS.items():
        if re.match(beginning, data[:1000], re.DOTALL):
            raise _unread(name)
    for name in FORMATS:
        accept = Image.OPEN[name][1]
        if accept is None or accept(data[:16]) is True:
            if name == "TIFF" and (raw := _camera_raw(data)):
                raise _unread(raw)
            return name
    raise ImageError("", "not an image")


def _unread(name: str) -> ImageError:
    return ImageError("", f"{name} is not read; convert it to JPEG or PNG")


def _camera_raw(data: bytes) -> str:
    """Name the camera's raw format that a TIFF really is; "" for an ordinary TIFF.

    Pillow would read its first directory, which is a small preview.
    """
    order = "<" if data.startswith(b"II") else ">"
    pointers, maker, raw = [4], b"", False  # where the offsets of directories stand
    with suppress(struct.error):
        for _ in range(16):
            (at,) = struct.unpack_from(f"{order}I", data, pointers.pop(0))
            (count,) = struct.unpack_from(f"{order}H", data, at) if at else (0,)
            for entry in range(at + 2, at + 2 + 12 * min(count, 1000), 12):
                tag, kind, number = struct.unpack_from(f"{order}HHI", data, entry)
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)
                if tag == _DNG_VERSION:
                    return "DNG"
                if tag == _MAKER:
                    maker = maker or data[value : value + min(number, 20)].lower()
                if tag == _MORE_DIRECTORIES:
                    first = entry + 8 if number == 1 else value
                    pointers += range(first, first + 4 * min(number, 8), 4)
                raw = raw or (tag, value) in _SENSORS
            if at:
                pointers.append(at + 2 + 12 * count)
            if not pointers:
                break
    known = (name for start, name in _MAKERS.items() if maker.startswith(start))
    return next(known, "a camera's raw format") if raw else ""


def _opened(data: bytes, form: str) -> Image.Image:
    """Read a header as `Image.open` does, without its own limit: that one warns, or hides W x H."""
    return Image.OPEN[form][0](io.BytesIO(data), "")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP file, by its first chunk.

    Raises:
        struct.error: the file ends before them.
    """
    kind = data[12:16]
    if kind == b"VP8X":
        low, high, *rest = struct.unpack_from("<HBHB", data, 24)
        return (high << 16 | low) + 1, (rest[1] << 16 | rest[0]) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _rgb(image: Image.Image) -> Iterator[np.ndarray]:
    """Strips of uint8 (h, W, 3) of any mode, by the table at the top of this file."""
    if image.mode.startswith("I") or image.mode == "F":
        low, high = _range(image)
        for strip in _strips(image):
            grey = np.nan_to_num(
                np.asarray(strip).astype(np.float64), nan=low, posinf=high, neginf=low
            )
            eight = ((grey - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
            yield np.repeat(eight[:, :, None], 3, axis=2)
        return
    transparent = image.has_transparency_data
    for strip in _strips(image):
        if transparent:
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip.convert("RGBA"))
        yield np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """Cut an image into strips from top to bottom, each as wide as the image."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        yield image
        return
    for top in range(0, height, rows):
        yield image.crop((0, top, width, min(height, top + rows)))


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the values that become black and white, of a mode of more than eight bits."""
    lows, highs, whole = [], [], True
    for strip in _strips(image):
        grey = np.asarray(strip)
        whole = grey.dtype.kind != "f"
        finite = grey if whole else grey[np.isfinite(grey)]
        if finite.size:
            lows.append(float(finite.min()))
            highs.append(float(finite.max()))
    low, high = min(lows), max(highs)
    return (0.0, 65535.0) if whole and low >= 0 and high <= 65535 else (low, high)


# --- in a worker process ---


def serve(connection: socket.socket) -> None:
    """Decode for the parent process until it goes away.

    A request says how many bytes of memory decoding may take, and carries a handle of the file.
    The answer is the shape of the pixels and a handle of them, or the reason why there are none;
    or how much memory it takes, when that is more: the parent asks again, without a file, once
    it has so much. SIGPROF ends this process when a file has taken its CPU time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)  # counts memory that is shared as a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    Image.init()
    send(connection, {"ready": True})
    raster: Raster | None = None
    while True:
        request, file = receive(connection)
        answer: dict[str, Any] = {}
        pixels = SharedArray()
        try:
            if file is not None:
                size = os.fstat(file).st_size
                _limit(SECONDS, SPARE + 2 * size)
                raster = Raster(os.pread(file, size, 0))
            assert raster is not None
            if raster.memory > request["allowed"]:
                answer = {"memory": raster.memory}
            else:
                _limit(raster.seconds, SPARE + raster.memory)
                raster.write(pixels)
                answer = {"shape": pixels.shape}
        except MemoryError:
            answer = {"reason": OVERSIZE}
        except Exception as error:
            answer = {"reason": reason(error)}
        _limit(0, None)
        raster = raster if "memory" in answer else None
        send(connection, answer, pixels.handle if "shape" in answer else None)
        for handle in (file, pixels.handle):
            if handle is not None:
                os.close(handle)


class SharedArray:
    """Memory that another process can be given: an uint8 array of the shape it is called with."""

    handle: int | None = None
    shape: tuple[int, ...] = ()

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        self.handle, self.shape = os.memfd_create("pixels"), shape
        os.truncate(self.handle, math.prod(shape))
        return np.frombuffer(mmap.mmap(self.handle, 0), np.uint8).reshape(shape)


def send(connection: socket.socket, message: dict[str, Any], handle: int | None = None) -> None:
    """Send a message, and perhaps a file, through a socket that keeps messages apart."""
    handles = [] if handle is None else [handle]
    socket.send_fds(connection, [json.dumps(message).encode()], handles)


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Wait for a message, and the file that may come with it.

    Raises:
        EOFError: the other side has gone.
    """
    text, handles, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    if not text:
        raise EOFError
    return json.loads(text), handles[0] if handles else None


def _limit(seconds: float, more: int | None) -> None:
    """Allow this process so many seconds of CPU time from now on (0: any) and bytes of memory."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if more is None else held + more, most))


if __name__ == "__main__":
    with suppress(EOFError, ConnectionError):
        serve(socket.socket(fileno=int(sys.argv[1])))
