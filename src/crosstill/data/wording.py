"""Five captions of a scene, each worded differently and telling other facets of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from crosstill.data.scenery import Scene, Thing

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


def captions(scene: Scene, draw: random.Random) -> tuple[str, ...]:
    """Five sentences; which synonyms they use is drawn, what they say follows from the scene."""
    tell = (_one, _two, _three)[len(scene.things) - 1]
    return tuple(text[0].upper() + text[1:] + "." for text in tell(scene, draw))


def _one(scene: Scene, draw: random.Random) -> Sequence[str]:
    thing = scene.things[0]
    spot = f"in the {_SPOTS[int(thing.y // 32)][int(thing.x // 32)]}"
    return (
        f"{_full(thing)} {spot} of a {scene.background} background",
        f"there is only {_full(thing)}, {spot}",
        f"{_plain(thing)} {spot}, {draw.choice(('all else', 'the rest'))} is {scene.background}",
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
        f"on {scene.background}, {_plain(first)} with {_plain(second)} {here}",
        f"{_band(scene)}, {_plain(first)} {joined} {_plain(second)}",
        f"{_coloured(first, 'shape')} and {_coloured(second, 'one')} "
        f"{draw.choice(_GROUND)} {scene.background}",
    )


def _three(scene: Scene, draw: random.Random) -> Sequence[str]:
    first, second, third = scene.things
    order = "from left to right" if scene.across else "from top to bottom"
    line = "row" if scene.across else "column"
    plain = f"{_plain(first)}, {_plain(second)} and {_plain(third)}"
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


def _plain(thing: Thing) -> str:
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.shape}"
