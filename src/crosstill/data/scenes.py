"""`scenes`: a captioned dataset that is rendered here, so that nothing has to be downloaded.

A scene has one to three shapes on a tinted background. It and its five captions are a pure
function of (seed, index): "scenes:200" is the start of "scenes:2000", and the folder that `write`
makes holds the same ids, captions and splits.
"""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from crosstill import files
from crosstill.data.pairs import HashedReader, Pairs
from crosstill.errors import DataError
from crosstill.images import Quarantine
from crosstill.types import Example, image_id

COUNT = 2000
_MOST = 1_000_000
SIDE = 96  # pixels
_FINE = 3  # drawn this many times larger, then averaged: smooth edges
_SIZES = {"small": 10.0, "large": 18.0}  # radius in pixels

_BUSY = (1, 7, 2)  # how many of ten scenes have one thing, two, and three
_PLAIN = (6, 3, 1)

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
_ROWS = ("near the top", "across the middle", "near the bottom")
_COLUMNS = ("along the left side", "down the middle", "along the right side")
_GROUND = ("against", "on")
_BEFORE = {True: "to the left of", False: "above"}
_AFTER = {True: "to the right of", False: "below"}
_SPOTS = (
    ("top left corner", "upper middle", "top right corner"),
    ("left half", "centre", "right half"),
    ("bottom left corner", "lower middle", "bottom right corner"),
)


def read(source: str) -> Pairs:
    """Render the dataset named "scenes[:COUNT[:SEED]]"; of ten, eight train, one val, one test.

    Raises:
        DataError: COUNT or SEED is not a number that can be used.
    """
    count, seed = _parse(source)
    examples = []
    for index in range(count):
        data, captions = scene(seed, index)
        examples.append(Example(image_id(data), _file(index), captions, _split(index)))
    return Pairs(
        name=f"scenes:{count}:{seed}",
        examples=tuple(examples),
        quarantine=Quarantine(),
        source={"form": "scenes", "seed": seed, "count": count},
        read=HashedReader(partial(read_scene, seed)),
    )


def scene(seed: int, index: int, plain: bool = False) -> tuple[bytes, tuple[str, ...]]:
    """Render one scene -> its PNG file and its captions: five, more where it is `plain`."""
    draw = random.Random(f"scene:{seed}:{index}")
    composed = compose(draw, _PLAIN if plain else _BUSY)
    captions = describe(composed, draw)
    captions += short_captions(composed.things) if plain else ()
    return render(composed, draw), captions


def read_scene(seed: int, example: Example) -> bytes:
    """Render the file of one example again: the bytes of which its id is the hash."""
    return scene(seed, int(PurePath(example.path).stem))[0]


def scenes_reader(record: Mapping[str, Any]) -> Callable[[Example], bytes]:
    """Make the function from an example to its bytes again, from the record of the dataset."""
    return partial(read_scene, int(record["seed"]))


def write(folder: Path, count: int = COUNT, seed: int = 0, plain: bool = False) -> Path:
    """Write scenes as PNG files beside a Karpathy `dataset.json`, and return its path.

    Args:
        folder: made if it is not there.
        count: scenes.
        seed: of the scenes.
        plain: write other scenes, more like what people have: six in ten show one thing, and
            `short_captions` follow the five.

    Raises:
        InputError: the folder cannot be written to.
    """
    files.writable_folder(folder)
    items = []
    for index in range(count):
        data, captions = scene(seed, index, plain)
        (folder / _file(index)).write_bytes(data)
        sentences = [{"raw": text} for text in captions]
        items.append({"filename": _file(index), "split": _split(index), "sentences": sentences})
    path = folder / "dataset.json"
    name = f"{'plain-' if plain else ''}scenes:{count}:{seed}"
    files.write_json(path, {"dataset": name, "images": items})
    return path


def _parse(source: str) -> tuple[int, int]:
    _, *numbers = source.split(":")
    try:
        count, seed = (*map(int, numbers), *(COUNT, 0)[len(numbers) :])
    except ValueError:
        count, seed = 0, 0
    if not 0 < count <= _MOST:
        raise DataError(
            f"{source}: write scenes, scenes:COUNT or scenes:COUNT:SEED, COUNT up to {_MOST}"
        )
    return count, seed


def _file(index: int) -> str:
    return f"{index:06d}.png"


def _split(index: int) -> str:
    return {8: "val", 9: "test"}.get(index % 10, "train")


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


def compose(draw: random.Random, shares: Sequence[int] = _BUSY) -> Scene:
    """Draw a scene of one, two or three things, no two of the same colour.

    Args:
        draw: random numbers.
        shares: how often it has one thing, two, and three.
    """
    count = draw.choices((1, 2, 3), shares)[0]
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
    """Draw a scene as a PNG file; the grain from `draw` makes every picture new."""
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
    """Return the position of a thing in a row of `count`, in pixels along the row."""
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
    """Return a thing's outline on the fine canvas, moved right and down by `offset` pixels."""
    cosine, sine = math.cos(thing.tilt) * thing.radius, math.sin(thing.tilt) * thing.radius
    x0, y0 = thing.x + offset, thing.y + offset
    return [
        ((x0 + x * cosine - y * sine) * _FINE, (y0 + x * sine + y * cosine) * _FINE)
        for x, y in OUTLINES[thing.shape]
    ]


def _grained(image: Image.Image, draw: random.Random) -> np.ndarray:
    """Add light from above and a grain of -3..4 grey levels a channel."""
    grain = np.frombuffer(draw.randbytes(SIDE * SIDE * 3), np.uint8).reshape(SIDE, SIDE, 3)
    light = np.linspace(5, -7, SIDE).round().astype(np.int16)[:, None, None]
    return (np.asarray(image) + light + (grain >> 5) - 3).clip(0, 255).astype(np.uint8)


def describe(scene: Scene, draw: random.Random) -> tuple[str, ...]:
    """Write five captions of a scene, each of other facets; their synonyms are drawn."""
    tell = (_one, _two, _three)[len(scene.things) - 1]
    return tuple(text[0].upper() + text[1:] + "." for text in tell(scene, draw))


def _one(scene: Scene, draw: random.Random) -> Sequence[str]:
    thing = scene.things[0]
    spot = f"in the {_SPOTS[int(thing.y // 32)][int(thing.x // 32)]}"
    rest = draw.choice(("all else", "the rest"))
    return (
        f"{_full(thing)} {spot} of a {scene.background} background",
        f"there is only {_full(thing)}, {spot}",
        f"{name_thing(thing)} {spot}, {rest} is {scene.background}",
        f"{spot}, a {draw.choice(('single', 'lone'))} {thing.colour} {thing.shape}",
        f"one {thing.size} {thing.colour} shape {draw.choice(_GROUND)} {scene.background}",
    )


def _two(scene: Scene, draw: random.Random) -> Sequence[str]:
    first, second = scene.things
    before, after = _BEFORE[scene.across], _AFTER[scene.across]
    here = "to its right" if scene.across else "below it"
    joined = "beside" if scene.across else draw.choice(("over", "on top of"))
    return (
        f"{_full(first)} {before} {_full(second)} on a {scene.background} background",
        f"{_full(second)} {draw.choice(('is', 'sits', 'lies'))} {after} {_full(first)}",
        f"on {scene.background}, {name_thing(first)} with {name_thing(second)} {here}",
        f"{_band(scene)}, {name_thing(first)} {joined} {name_thing(second)}",
        f"{_coloured(first, 'shape')} and {_coloured(second, 'one')} "
        f"{draw.choice(_GROUND)} {scene.background}",
    )


def _three(scene: Scene, draw: random.Random) -> Sequence[str]:
    first, second, third = scene.things
    order = "from left to right" if scene.across else "from top to bottom"
    line = "row" if scene.across else "column"
    plain = f"{name_thing(first)}, {name_thing(second)} and {name_thing(third)}"
    return (
        f"{order}: {_full(first)}, {_full(second)} and {_full(third)} "
        f"on a {scene.background} background",
        f"{_full(second)} {draw.choice(('is', 'sits', 'lies'))} between "
        f"{_full(first)} and {_full(third)}",
        f"three shapes on {scene.background}: {plain}",
        f"{_band(scene)}, a {line} of {plain}",
        f"{_coloured(first, 'shape')}, {_coloured(second, 'one')} and {_coloured(third, 'one')} "
        f"{draw.choice(_GROUND)} {scene.background}",
    )


def _band(scene: Scene) -> str:
    return (_ROWS if scene.across else _COLUMNS)[scene.band]


def _full(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _coloured(thing: Thing, noun: str) -> str:
    return f"a {thing.size} {thing.colour} {noun}"


def short_captions(things: Sequence[Thing]) -> tuple[str, ...]:
    """Name the things of one scene as people type them: "a red heart", "red heart", "a heart".

    After these come sizes, "a small red heart", and all things at once, with colours and without.
    Shapes stand alone too because colours tell most scenes apart, and a model would learn shapes
    late.
    """
    names = [name_thing(thing) for thing in things]
    shapes = sorted(f"a {thing.shape}" for thing in things)
    texts = [*names, *(f"{thing.colour} {thing.shape}" for thing in things), *shapes]
    texts += [_full(thing) for thing in things]
    return tuple(dict.fromkeys([*texts, " and ".join(names), " and ".join(shapes)]))


def name_thing(thing: Thing) -> str:
    """Name a thing as people type it: "a red heart"."""
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.shape}"


def _star(points: int, inner: float, turn: float = -math.pi / 2) -> Outline:
    """Return a star of unit radius whose inner corners lie at `inner`."""
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
