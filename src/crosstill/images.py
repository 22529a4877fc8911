"""`pixels` for torch: decoded photos and seeded views of them as tensors, resized, normalised.

torch's antialiased filter does the resizing, since it is several times faster than numpy; the
pixels are those of `pixels.load`, bit for bit.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from crosstill import pixels
from crosstill.errors import ImageError
from crosstill.pixels import FORMATS, MAX_PIXELS, MAX_SIDE, Preprocess, Quarantine
from crosstill.types import Example

__all__ = [
    "AUGMENTATIONS",
    "FORMATS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "Preprocess",
    "Quarantine",
    "Unreadable",
    "View",
    "decode",
    "draw_view",
    "load",
    "normalise",
    "try_load",
]


Loaded = TypeVar("Loaded")

AUGMENTATIONS = ("crop", "flip", "colour")
_COLOUR = (0.75, 1.25)  # of brightness, contrast and saturation; captions name colours, so no hue
_ONE = 1 << 8  # 1.0 in the fixed-point numbers of `_coloured`


@dataclass(frozen=True, slots=True)
class View:
    """A crop of the upright image, perhaps mirrored and in other colours.

    Attributes:
        top, left, height, width: of the crop, in fractions of the image's height and width.
        flip: whether it is mirrored, left to right.
        brightness, contrast, saturation: factors; contrast is about the middle grey.
    """

    top: float
    left: float
    height: float
    width: float
    flip: bool
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def draw_view(
    image_id: str, view: int, seed: int, kinds: Collection[str] = AUGMENTATIONS
) -> View | None:
    """Draw the seeded view number `view` of an image; view 0 is the plain image: None.

    A pure function. Crops have an area of 0.5 to 1 and a ratio of 3/4 to 4/3 of the image's own;
    every other view is mirrored; brightness, contrast and saturation vary by a quarter. Kinds
    that are left out are drawn all the same, so that the others do not depend on them.
    """
    if view == 0:
        return None
    draw = random.Random(f"{image_id}:{view}:{seed}")
    area = draw.uniform(0.5, 1.0)
    # The bounds keep both sides within the image, so that nothing is drawn twice or clamped.
    ratio = draw.uniform(max(3 / 4, area), min(4 / 3, 1 / area))
    height, width = (area / ratio) ** 0.5, (area * ratio) ** 0.5
    top, left = draw.uniform(0, 1 - height), draw.uniform(0, 1 - width)
    flip = draw.random() < 0.5
    brightness, contrast, saturation = (draw.uniform(*_COLOUR) for _ in range(3))
    drawn = View(top, left, height, width, flip, brightness, contrast, saturation)
    if "crop" not in kinds:
        drawn = replace(drawn, top=0.0, left=0.0, height=1.0, width=1.0)
    if "flip" not in kinds:
        drawn = replace(drawn, flip=False)
    if "colour" not in kinds:
        drawn = replace(drawn, brightness=1.0, contrast=1.0, saturation=1.0)
    return drawn


def decode(data: bytes, path: str) -> Tensor:
    """As `pixels.decode`, for torch: uint8 (H, W, 3)."""
    return torch.from_numpy(pixels.decode(data, path))


def load(data: bytes, path: str, preprocess: Preprocess, view: View | None = None) -> Tensor:
    """Bring a file, or a view of it, squashed, to the model's size: uint8 (3, H, W).

    Raises:
        ImageError: see `decode`; also for an image too long for its resized form.
    """
    with pixels.upright(data, path) as whole:
        upright = torch.from_numpy(whole)
        if view is not None:
            cut = _resize(_cut(upright, view), preprocess.size, preprocess.interpolation)
            return _coloured(cut, view)
        height, width = preprocess.sides(*upright.shape[:2])
        pixels.check_size(width, height, path)
        resized = _resize(upright, (height, width), preprocess.interpolation)
    if preprocess.resize == "crop":
        return torch.from_numpy(pixels.centre(resized.numpy(), preprocess.size))
    return resized


class Unreadable(NamedTuple):
    """An image that could not be loaded, and why."""

    error: ImageError
    size: int  # of its file in bytes, as far as it could be read


def try_load(
    read: Callable[[Example], bytes], example: Example, load: Callable[[bytes], Loaded]
) -> Loaded | Unreadable:
    """Read an image's file and load it; return what is wrong with it instead of raising it."""
    file = b""
    try:
        file = read(example)
        return load(file)
    except ImageError as error:
        return Unreadable(error, len(file))


def normalise(values: Tensor, preprocess: Preprocess) -> Tensor:
    """Compute (pixels / 255 - mean) / std: uint8 (B, 3, H, W) → float32 (B, 3, H, W)."""
    mean, std = torch.tensor((preprocess.mean, preprocess.std)).view(2, 3, 1, 1).to(values.device)
    return (values.float() / 255 - mean) / std


def _cut(upright: Tensor, view: View) -> Tensor:
    height, width, _ = upright.shape
    rows, columns = max(1, round(view.height * height)), max(1, round(view.width * width))
    top = min(round(view.top * height), height - rows)
    left = min(round(view.left * width), width - columns)
    cut = upright[top : top + rows, left : left + columns]
    return cut.flip(1) if view.flip else cut


def _coloured(pixels: Tensor, view: View) -> Tensor:
    """(3, H, W) in the view's colours; in whole numbers, so that every machine gives the same."""
    if (view.brightness, view.contrast, view.saturation) == (1.0, 1.0, 1.0):
        return pixels
    level = torch.arange(256, dtype=torch.float64) * view.brightness
    level = ((level - 127.5) * view.contrast + 127.5).clamp(0, 255)
    red, green, blue = (level * _ONE).round().int()[pixels.int()]
    grey = (77 * red + 150 * green + 29 * blue) >> 8
    saturation = round(view.saturation * _ONE)
    channels = [grey * _ONE + saturation * (one - grey) for one in (red, green, blue)]
    return ((torch.stack(channels) + (1 << 15)) >> 16).clamp(0, 255).to(torch.uint8)


def _resize(upright: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """(H, W, 3 or 4) → (3, *size), by torch's uint8 kernel: fastest on four channels, kept last."""
    # The axis of one goes in front first: only then does torch see the layout in the strides.
    planes = upright[None].permute(0, 3, 1, 2)
    if tuple(upright.shape[:2]) != size:
        planes = nn.functional.interpolate(planes, size=size, mode=interpolation, antialias=True)
    return planes[0, :3]
