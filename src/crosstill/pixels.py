"""A model's preprocessing of images, and the one path from photos to such pixels, in numpy.

Training, caching, evaluation, indexing and serving all decode here, so that a teacher, its
student and the search box see the same pixels. JPEG is decoded in this process (`jpeg`),
everything else in worker processes (`decoding`) by Pillow (`rasters`). `load` resizes without
torch; `images` does so with it, faster, and the pixels are equal bit for bit. `MAX_PIXELS` and
`MAX_SIDE` are checked before anything is decoded.

`resize` gives the pixels of torch's antialiased uint8 kernel: weights are rounded to 16-bit
integers, and pixels to 8 bits after either axis, width first. Sums of such integers are exact in
floating point, so that a matrix product serves.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from crosstill import decoding, files, jpeg
from crosstill.errors import ConfigError, CorruptError, ImageError, unknown
from crosstill.rasters import FORMATS, MAX_PIXELS, MAX_SIDE, OVERSIZE, OVERTIME, check_size

__all__ = [
    "CLASSES",
    "FORMATS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "Preprocess",
    "Quarantine",
    "check_size",
    "count_left_out",
    "decode",
    "failure_class",
    "load",
    "quarantine_row",
    "read_classes",
    "resize",
    "upright",
]

# what is wrong with a file, by the beginning of the reason
_CLASSES = {
    "empty file": "empty",
    "not an image": "not-an-image",
    "too many": "too-large",
    "larger than": "too-large",
    OVERSIZE: "too-large",
    OVERTIME: "too-slow",
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

_REACH = {"bilinear": 1.0, "bicubic": 2.0}  # of the filter, in pixels of the smaller image
_STRIP = 256  # rows of the source whose width is resized at a time: a large photo need not be held
_BLOCK = 16  # rows of the result that share one product; few, since most weights are zero
_EXACT = 2**24  # float32 holds every integer up to here

_LARGEST = 4096  # pixels of what a model takes
_RULES = (
    1  # of `Preprocess`: raise it when the same bytes give other pixels: it is part of every digest
)
_LATER = {"longer": None, "multiple": 1}  # came after the first caches: said only where they count


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images.

    Attributes:
        size: height and width, in pixels, of what the model takes; with "fit", of a square image,
            and of views.
        resize: "squash" goes straight to `size`; "crop" brings the shorter side to `shorter`
            and cuts `size` from the centre, as CLIP does; "fit" brings the shorter side to
            `shorter` and cuts nothing, as ViLT does, so that images differ in size.
        shorter: pixels, for "crop" and "fit"; None means the longer one of `size`.
        interpolation: the antialiased filter.
        mean, std: per channel, of pixels in 0..1.
        longer: pixels, for "crop" and "fit": the image is made smaller yet where its longer side
            would pass this; None sets no bound.
        multiple: pixels, for "crop" and "fit": both sides are rounded down to multiples of it.

    Raises:
        ConfigError: a value that cannot work.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop", "fit"] = "squash"
    shorter: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    longer: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        least = self.shorter or max(self.size, default=0)
        squashes = self.resize == "squash"
        fits = {
            "size": len(self.size) == 2 and 0 < min(self.size) <= max(self.size) <= _LARGEST,
            "resize": self.resize in ("squash", "crop", "fit"),
            "shorter": self.shorter is None or self.shorter >= max(self.size),
            "interpolation": self.interpolation in ("bicubic", "bilinear"),
            "mean": len(self.mean) == 3,
            "std": len(self.std) == 3 and min(self.std) > 0,
            "longer": self.longer is None or (not squashes and self.longer >= least),
            "multiple": self.multiple == 1 or (not squashes and 1 < self.multiple <= least),
        }
        for name in (name for name, fit in fits.items() if not fit):
            raise ConfigError(f"preprocess {name}: {getattr(self, name)!r} is not possible")

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width an image is resized to, before anything is cut."""
        if self.resize == "squash":
            return self.size
        shorter, least = self.shorter or max(self.size), min(height, width)
        if self.resize == "crop" and self.longer is None and self.multiple == 1:
            return shorter * height // least, shorter * width // least
        # The order of these steps is that of ViLT's processor, to the last bit.
        tall, wide = (
            float(shorter) if side == least else shorter / least * side for side in (height, width)
        )
        scale = min(1.0, (self.longer or max(tall, wide)) / max(tall, wide))
        return self._rounded(tall * scale), self._rounded(wide * scale)

    def _rounded(self, side: float) -> int:
        return max(self.multiple, int(side + 0.5) // self.multiple * self.multiple)

    def to_json(self) -> dict[str, Any]:
        record = json.loads(json.dumps(asdict(self)))
        return {k: v for k, v in record.items() if k not in _LATER or v != _LATER[k]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` gave; keys that are absent take their defaults."""
        for key in value.keys() - cls.__dataclass_fields__.keys():
            raise unknown("preprocess key", key, cls.__dataclass_fields__)
        plain: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in value.items()}
        try:
            _types().model_validate(plain)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ConfigError(
                f"preprocess {first['loc'][0]}: {first['msg']}; export or save the model anew"
            ) from None
        return cls(**plain)  # not what was validated, in which 0 has become 0.0

    def digest(self) -> str:
        """Return the SHA-256 of what decides the pixels, the rules of `images` included."""
        return files.digest_json({"rules": _RULES, **self.to_json()})


@cache
def _types() -> type[BaseModel]:
    """Return a model of the types of all fields, none of which is converted."""
    hints = get_type_hints(Preprocess)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in dataclass_fields(Preprocess)
    }
    return create_model("Types", __config__=ConfigDict(strict=True), **fields)


def decode(data: bytes, path: str) -> np.ndarray:
    """Decode a file to upright RGB: uint8 (H, W, 3).

    Raises:
        ImageError: whatever is wrong with the bytes. The reason is one of "empty file",
            "not an image", "truncated", "too many pixels (W x H)", "too many scans (S of W x H)",
            "corrupt: …", "takes too long to decode", "too much memory" and, of formats known by
            name, "HEIC is not read; convert it …".
    """
    with upright(data, path) as pixels:
        return pixels[..., :3]


def load(data: bytes, path: str, preprocess: Preprocess) -> np.ndarray:
    """Bring a file to the model's size: uint8 (3, H, W), the same pixels as `images.load`.

    Raises:
        ImageError: see `decode`; also for an image too long for its resized form.
    """
    with upright(data, path) as pixels:
        height, width = preprocess.sides(*pixels.shape[:2])
        check_size(width, height, path)
        resized = resize(pixels, (height, width), preprocess.interpolation)
    planes = np.moveaxis(resized, 2, 0)[:3]
    return np.ascontiguousarray(
        centre(planes, preprocess.size) if preprocess.resize == "crop" else planes
    )


def failure_class(reason: str) -> str:
    """Return the one of `CLASSES` that a reason belongs to: few and fixed, for counting.

    >>> failure_class("too many pixels (50000 x 50000)")
    'too-large'
    """
    if " is not read" in reason:
        return "unsupported-format"
    names = (name for start, name in _CLASSES.items() if reason.startswith(start))
    return next(names, "unreadable")


def quarantine_row(path: str, reason: str, size_in_bytes: int) -> dict[str, Any]:
    """Return one line of quarantine.jsonl."""
    kind = failure_class(reason)
    return {"path": path, "class": kind, "reason": reason, "bytes": size_in_bytes}


# those of the classes whose images can be read; of all others "unreadable images left out"
_SOUND = {"no-vector": "no vector for {:,} photos", "no-caption": "no caption for {:,} photos"}


def count_left_out(classes: Iterable[str]) -> str:
    """Say how many images were left out and why, in a few words; "" where there are none.

    >>> count_left_out(["no-vector", "no-vector", "truncated"])
    'unreadable images left out: 1; no vector for 2 photos'
    """
    counts = Counter(name if name in _SOUND else "unreadable" for name in classes)
    words = {"unreadable": "unreadable images left out: {}"} | _SOUND
    return "; ".join(text.format(counts[name]) for name, text in words.items() if counts[name])


def read_classes(path: Path) -> list[str]:
    """Read the class of each line of a quarantine.jsonl; nothing where there is no such file.

    Raises:
        CorruptError: a line is none of a quarantine.
    """
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [str(row.get("class") or failure_class(row["reason"])) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptError(f"{path}: not the list of images that were left out") from None


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


@contextmanager
def upright(data: bytes, path: str) -> Iterator[np.ndarray]:
    """Decode as `decode` does: (H, W, 3), or (H, W, 4) with a filler, which torch resizes faster.

    The memory that it takes is counted in the process's budget until the block ends.
    """
    if not data:
        raise ImageError(path, "empty file")
    decoder = jpeg.decode if data.startswith(b"\xff\xd8") else decoding.decode
    with decoder(data, path) as pixels:
        yield pixels


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


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an image with the antialiased filter.

    Args:
        pixels: uint8 (H, W, C).
        size: height and width of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 (*size, C).
    """
    height, width = size
    if pixels.shape[1] != width:
        strips = [pixels[at : at + _STRIP] for at in range(0, len(pixels), _STRIP)]
        done = [_turned(_along_rows(_turned(strip), width, interpolation)) for strip in strips]
        pixels = np.concatenate(done) if len(done) > 1 else done[0]
    if pixels.shape[0] != height:
        pixels = _along_rows(pixels, height, interpolation)
    return pixels


def _turned(pixels: np.ndarray) -> np.ndarray:
    """Turn uint8 (N, M, C) → (M, N, C). Four channels move as one number, several times as fast."""
    if pixels.shape[2] == 4 and pixels.flags.c_contiguous:
        words = pixels.view(np.uint32)[:, :, 0]
        return np.ascontiguousarray(words.T)[:, :, None].view(np.uint8)
    return np.ascontiguousarray(pixels.swapaxes(0, 1))


def _along_rows(pixels: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """uint8 (N, M, C) → (size, M, C)."""
    blocks = _blocks(pixels.shape[0], size, interpolation)
    rows = pixels.astype(blocks[0][1].dtype, order="C").reshape(len(pixels), -1)
    out = np.empty((size, rows.shape[1]), rows.dtype)
    for at, (first, weights) in zip(range(0, size, _BLOCK), blocks, strict=True):
        np.matmul(weights, rows[first : first + weights.shape[1]], out=out[at : at + _BLOCK])
    out += 0.5
    # what is not negative is rounded down by the conversion itself
    return np.clip(out, 0, 255, out=out).astype(np.uint8).reshape(size, *pixels.shape[1:])


@lru_cache(256)
def _blocks(source: int, target: int, interpolation: str) -> list[tuple[int, np.ndarray]]:
    """Return, for every `_BLOCK` rows of the result, the first row read and the weights from there.

    They are integers over a power of two, the greatest at which the largest fits 16 bits, 2**22 at
    most. Dividing by it changes no digit, so that sums are as exact as those of the integers.
    """
    rows = [_row(i, source, target, interpolation) for i in range(target)]
    top = max(weights.max() for _, weights in rows)
    precision = 0
    while precision < 22 and int(0.5 + top * 2 ** (precision + 1)) < 2**15:
        precision += 1
    blocks = [_block(rows[at : at + _BLOCK], precision) for at in range(0, target, _BLOCK)]
    greatest = max(np.abs(block).sum(axis=1).max() for _, block in blocks) * 255 + 2**precision
    kind = np.float32 if greatest < _EXACT else np.float64
    return [(first, (block * 2.0**-precision).astype(kind)) for first, block in blocks]


def _row(i: int, source: int, target: int, interpolation: str) -> tuple[int, np.ndarray]:
    """Return the first source pixel that row i of the result reads, and the weights from there."""
    scale = source / target
    wide = max(scale, 1.0)
    centre, reach = scale * (i + 0.5), _REACH[interpolation] * wide
    first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), source)
    weights = _filter(np.abs(np.arange(first, last) - centre + 0.5) / wide, interpolation)
    return first, weights / weights.sum()


def _block(rows: list[tuple[int, np.ndarray]], precision: int) -> tuple[int, np.ndarray]:
    first = min(at for at, _ in rows)
    last = max(at + len(weights) for at, weights in rows)
    block = np.zeros((len(rows), last - first))
    for line, (at, weights) in zip(block, rows, strict=True):
        scaled = weights * 2**precision
        line[at - first : at - first + len(weights)] = np.trunc(scaled + np.copysign(0.5, scaled))
    return first, block


def _filter(x: np.ndarray, interpolation: str) -> np.ndarray:
    """Evaluate the filter at distances x >= 0; the cubic is Keys' with a = -0.5."""
    if interpolation == "bilinear":
        return np.clip(1 - x, 0, None)
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
