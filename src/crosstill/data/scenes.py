"""`scenes`: a captioned dataset that is rendered here, so that nothing has to be downloaded.

A scene and its five captions are a pure function of (seed, index): "scenes:200" is the start of
"scenes:2000", and the folder that `write` makes holds the same ids, captions and splits.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path, PurePath

from crosstill import files
from crosstill.data import scenery, wording
from crosstill.data.base import HashedReader, Pairs
from crosstill.errors import DataError
from crosstill.images import Quarantine
from crosstill.types import Example, image_id

COUNT = 2000
_MOST = 1_000_000


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


def scene(seed: int, index: int) -> tuple[bytes, tuple[str, ...]]:
    """The PNG file and the five captions of one scene."""
    draw = random.Random(f"scene:{seed}:{index}")
    composed = scenery.compose(draw)
    captions = wording.captions(composed, draw)
    return scenery.render(composed, draw), captions


def read_scene(seed: int, example: Example) -> bytes:
    """Render the file of one example again: the bytes of which its id is the hash."""
    return scene(seed, int(PurePath(example.path).stem))[0]


def write(folder: Path, count: int = COUNT, seed: int = 0) -> Path:
    """Write the scenes as PNG files beside a Karpathy `dataset.json`, and return its path."""
    files.writable_folder(folder)
    items = []
    for index in range(count):
        data, captions = scene(seed, index)
        (folder / _file(index)).write_bytes(data)
        sentences = [{"raw": text} for text in captions]
        items.append({"filename": _file(index), "split": _split(index), "sentences": sentences})
    path = folder / "dataset.json"
    files.write_json(path, {"dataset": f"scenes:{count}:{seed}", "images": items})
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
