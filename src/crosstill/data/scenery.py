"""What a scene is and how it looks: one to three shapes on a tinted background."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96  # pixels
_FINE = 3  # drawn this many times larger, then averaged: smooth edges
_SIZES = {"small": 10.0, "large": 18.0}  # radius in pixels

COLOURS = {
    "red": (214, 45, 48),
    "orange": (243, 135, 28),
    "yellow": (248, 205, 40),
    "green": (44, 158, 72),
    "blue": (38, 96, 220),
    "purple": (130, 60, 188),
    "pink": (244, 118, 178),
    "brown": (126, 78, 42),
}
BACKGROUNDS = {
    "white": (247, 247, 245),
    "grey": (196, 199, 204),
    "cream": (250, 236, 200),
    "pale blue": (200, 223, 246),
    "pale green": (205, 236, 208),
    "pale pink": (250, 217, 226),
}

Outline = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape; its centre is in pixels from the top left corner, its tilt in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Things from left to right where `across`, else from top to bottom.

    `band` (0, 1, 2) is where that row or column lies: top, middle, bottom, or left, middle, right.
    """

    things: tuple[Thing, ...]
    across: bool
    band: int
    background: str


def compose(draw: random.Random) -> Scene:
    """Draw a scene: mostly two things, sometimes one or three, no two of the same colour."""
    count = draw.choices((1, 2, 3), (1, 7, 2))[0]
    across, band = draw.random() < 0.5, draw.randrange(3)
    colours = draw.sample(sorted(COLOURS), count)
    things = tuple(
        _thing(draw, colour, _along(draw, place, count), 24 + 24 * band, across)
        for place, colour in enumerate(colours)
    )
    if count == 3:  # smaller ones, so that they do not touch
        things = tuple(replace(thing, radius=0.78 * thing.radius) for thing in things)
    return Scene(things, across, band, draw.choice(sorted(BACKGROUNDS)))


def render(scene: Scene, draw: random.Random) -> bytes:
    """A scene as the bytes of a PNG file; `draw` gives the grain that makes every picture new."""
    tint = tuple(c + draw.randint(-4, 4) for c in BACKGROUNDS[scene.background])
    canvas = Image.new("RGB", (SIDE * _FINE, SIDE * _FINE), tint)
    pen = ImageDraw.Draw(canvas)
    shadow = tuple(int(c * 0.86) for c in tint)
    for thing in scene.things:
        pen.polygon(_placed(thing, 1.6), fill=shadow)
        colour = tuple(c + draw.randint(-12, 12) for c in COLOURS[thing.colour])
        pen.polygon(_placed(thing, 0.0), fill=colour)
    file = io.BytesIO()
    Image.fromarray(_grained(canvas.reduce(_FINE), draw)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _along(draw: random.Random, place: int, count: int) -> float:
    """Where the thing at a place of a row of `count` stands, in pixels along the row."""
    if count == 1:
        return draw.choice((24, 48, 72))
    return 26 + 44 * place if count == 2 else 18 + 30 * place


def _thing(draw: random.Random, colour: str, along: float, beside: float, across: bool) -> Thing:
    along, beside = along + draw.uniform(-2, 2), beside + draw.uniform(-3, 3)
    x, y = (along, beside) if across else (beside, along)
    size = draw.choice(sorted(_SIZES))
    radius = _SIZES[size] * draw.uniform(0.92, 1.08)
    shape = draw.choice(sorted(OUTLINES))
    return Thing(shape, colour, size, x, y, radius, draw.uniform(-0.12, 0.12))


def _placed(thing: Thing, offset: float) -> Outline:
    """The outline of a thing on the fine canvas, moved right and down by `offset` pixels."""
    cosine, sine = math.cos(thing.tilt) * thing.radius, math.sin(thing.tilt) * thing.radius
    x0, y0 = thing.x + offset, thing.y + offset
    return [
        ((x0 + x * cosine - y * sine) * _FINE, (y0 + x * sine + y * cosine) * _FINE)
        for x, y in OUTLINES[thing.shape]
    ]


def _grained(image: Image.Image, draw: random.Random) -> np.ndarray:
    """Light from above and a grain of -3..4 grey levels a channel."""
    grain = np.frombuffer(draw.randbytes(SIDE * SIDE * 3), np.uint8).reshape(SIDE, SIDE, 3)
    light = np.linspace(5, -7, SIDE).round().astype(np.int16)[:, None, None]
    return (np.asarray(image) + light + (grain >> 5) - 3).clip(0, 255).astype(np.uint8)


def _star(points: int, inner: float, turn: float = -math.pi / 2) -> Outline:
    """A star of unit radius whose inner corners lie at `inner`; with 1 x corners, a polygon."""
    return [
        (radius * math.cos(turn + angle), radius * math.sin(turn + angle))
        for k in range(points)
        for radius, angle in (
            (1.0, 2 * math.pi * k / points),
            (inner, 2 * math.pi * (k + 0.5) / points),
        )
    ]


def _polygon(corners: int, turn: float = -math.pi / 2) -> Outline:
    return _star(corners, math.cos(math.pi / corners), turn)


def _ring() -> Outline:
    outer = _polygon(32)
    outer.append(outer[0])
    return outer + [(0.55 * x, 0.55 * y) for x, y in reversed(outer)]


def _cross(arm: float) -> Outline:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turned = [(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter]
    return [*quarter, *turned[0], *turned[1], *[(y, -x) for x, y in quarter]]


def _heart() -> Outline:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


OUTLINES: dict[str, Outline] = {
    "circle": _polygon(32),
    "square": _polygon(4, math.pi / 4),
    "triangle": _polygon(3),
    "diamond": [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],
    "star": _star(5, 0.42),
    "cross": _cross(0.34),
    "ring": _ring(),
    "heart": _heart(),
}
