"""What several tests use: a teacher and a student so small that a whole run takes a second."""

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crosstill import files, students
from crosstill.cache import Cache, build
from crosstill.data import Pairs
from crosstill.images import Preprocess
from crosstill.students.student import Student
from crosstill.students.student_config import StudentConfig

PATIENCE = 120.0  # seconds by the clock after which a test believes that something hangs

SETTINGS = {
    "epochs": 2,
    "batch_size": 24,
    "lr": 1e-3,
    "losses": {
        "contrastive": {"queue_size": 50},
        "feature": {},
        "similarity": {},
        "hard_negative": {},
    },
    "save_every": 3,
    "log_every": 1,
}


# a grid whose runs take a second
FAST = (
    "epochs=1",
    "steps_per_epoch=4",
    "batch_size=16",
    "lr=1e-3",
    "log_every=1",
    "losses.contrastive.queue_size=64",
)


def matrix(cases: Iterable[object], chosen: Collection[object]) -> list[object]:
    """The cases for `parametrize`, of which only those that are chosen run by default."""
    return [
        case
        if case in chosen
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def lengthen(listing: Path, out: Path) -> Path:
    """Write a copy of a Karpathy listing in which the first caption of each image is long."""
    record = json.loads(listing.read_text())
    for item in record["images"]:
        item["sentences"][0]["raw"] += " and a red circle" * 20
    out.write_text(json.dumps(record))
    return out


class SmallTeacher:
    """A teacher that runs in microseconds: colour averages and letter counts, projected.

    `limit` makes it die after so many batches, as a machine would.
    """

    kind = "encoder"
    modalities = frozenset({"image", "text"})
    licence = "apache-2.0"
    source = "small"

    def __init__(self, dim: int = 16, weights: int = 0, limit: int | None = None) -> None:
        random = torch.Generator().manual_seed(weights)
        self.name, self.dim, self.limit = "small", dim, limit
        self.preprocess = Preprocess(size=(8, 8))
        self._image = torch.randn(3 * 16, dim, generator=random)
        self._text = torch.randn(26, dim, generator=random)
        self._weights = weights

    def identity(self) -> dict[str, str]:
        return {
            "weights": str(self._weights),
            "preprocess": self.preprocess.digest(),
            "tokenizer": "letters",
            "activation": "none",
            "family": "small",
        }

    def parameter_count(self) -> int:
        return self._image.numel() + self._text.numel()

    def embed_images(self, pixels: Tensor) -> Tensor:
        self._live()
        cells = functional.adaptive_avg_pool2d(pixels.float() / 255 - 0.5, 4).flatten(1)
        return functional.normalize(cells @ self._image, dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self._live()
        counts = [[text.lower().count(chr(97 + i)) + 0.01 for i in range(26)] for text in texts]
        return functional.normalize(torch.tensor(counts) @ self._text, dim=1)

    def count_truncated(self, texts: Sequence[str]) -> int:
        return 0

    def _live(self) -> None:
        if self.limit is not None:
            self.limit -= 1
            if self.limit < 0:
                raise KeyboardInterrupt


class RawTeacher(SmallTeacher):
    """The small teacher with rows of other lengths than 1."""

    stretch = 3.0

    def raw_images(self, pixels: Tensor) -> Tensor:
        return self.stretch * self.embed_images(pixels)

    def raw_texts(self, texts: Sequence[str]) -> Tensor:
        return self.stretch * self.embed_texts(texts)


class SmallJudge:
    """A fusion teacher that runs in microseconds: brightness against length.

    `limit` makes it die after so many calls, as a machine would.
    """

    licence = "mit"
    source = "judge"

    def __init__(self, weights: float = 1.0, limit: int | None = None) -> None:
        self.name, self.limit, self._weights = "judge", limit, weights
        self.preprocess = Preprocess(size=(8, 8))

    def identity(self) -> dict[str, str]:
        return {"weights": str(self._weights), "preprocess": self.preprocess.digest()}

    def parameter_count(self) -> int:
        return 1

    def score(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        if self.limit is not None:
            self.limit -= 1
            if self.limit < 0:
                raise KeyboardInterrupt
        light = torch.stack([image.float().mean() for image in images])
        length = torch.tensor([float(len(text)) for text in texts])
        return self._weights * torch.sin(light * length)


def small_config(dropout: float = 0.1) -> StudentConfig:
    """A ViT and a BERT of one layer and width 16."""
    layer = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    image = {"model_type": "vit", "image_size": 16, "patch_size": 8, **layer}
    return StudentConfig.model_validate(
        {
            "name": "small",
            "image": {"config": image, "pooling": "cls"},
            "text": {"config": {"model_type": "bert", **layer}, "pooling": "mean"},
        }
    )


def small_student(cached: Cache, dropout: float = 0.1) -> Student:
    """The untrained student of that configuration, as wide as the cache."""
    return students.build(small_config(dropout), dim=cached.dim, captions=cached.texts)


def mixed_cache(scenes: Pairs, folder: Path, every: int) -> Cache:
    """A cache in which every so-and-so-many-th photo has captions (0: none), with loose texts."""
    captions = [caption for example in scenes.examples for caption in example.captions]
    examples = tuple(
        example if every and row % every == 0 else replace(example, captions=())
        for row, example in enumerate(scenes.examples)
    )
    lines = [f"{caption}, {row}" for row, caption in enumerate(captions[:90])]
    return build(SmallTeacher(), replace(scenes, examples=examples), folder, texts=lines)


def same(a: object, b: object) -> bool:
    """Equal to the last bit, through nested dicts and lists."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def flip(whole: bytes, choose: np.random.Generator) -> bytes:
    """One bit turned."""
    damaged = bytearray(whole)
    damaged[choose.integers(len(whole))] ^= 1 << int(choose.integers(8))
    return bytes(damaged)


def cut(whole: bytes, choose: np.random.Generator) -> bytes:
    """The end gone."""
    return whole[: choose.integers(len(whole) - 1)]


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process that asks for it fills; read it, never write to it."""
    root = tmp_path_factory.getbasetemp()
    # processes that share a test run have base folders side by side
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    place, done = root / name, root / f"{name}.done"
    with files.locked(root, wait=True, name=f"{name}.lock"):
        if not done.exists():
            make(place)
            done.touch()
    return place


def wait_for(condition: Callable[[], Any], pause: float = 0.02) -> Any:
    """Look at a condition until it holds, however busy the machine is; return what it is then."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
    return value
