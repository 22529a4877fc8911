"""Building of untrained students: towers are read or started, then get their heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from crosstill.data.pairs import read_licence
from crosstill.students.config import ImageTowerConfig, StudentConfig, TextTowerConfig, TowerConfig
from crosstill.students.student import Student
from crosstill.towers import build, hub, narrow, processors, vocabulary


def assemble(config: StudentConfig, captions: Sequence[str], seed: int) -> Student:
    """Build an untrained student; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image = image_part(config.image)
        text = text_part(config.text, captions)
        # Drawn anew, so that the heads do not depend on how the towers came about.
        torch.manual_seed(seed + 1)
        return Student(config, image, text)


def image_part(config: ImageTowerConfig) -> build.ImagePart:
    """Read or start an image tower; its preprocess is that of its source: see `processors.fit`.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or pooled as asked.
    """
    if config.source is None:
        tower = build.assemble(_started(config), config.pooling)
        build.check_class_token(tower, config.pooling)
        return build.ImagePart(tower, processors.default(tower.config), None)
    folder = hub.locate(config.source)
    tower = build.read(folder, "image", config.pooling, config.layers)
    build.check_class_token(tower, config.pooling)
    return build.ImagePart(tower, processors.fit(folder, tower), read_licence(folder))


def text_part(config: TextTowerConfig, captions: Sequence[str]) -> build.TextPart:
    """Read or start a text tower; the captions train or trim its vocabulary.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or trimmed as asked.
    """
    licence = None
    if config.source is None:
        start = _started(config)
        tokenizer = vocabulary.train(captions, start.vocab_size)
        build.name_tokens(start, tokenizer)
        tower = build.assemble(start, config.pooling)
    else:
        folder = hub.locate(config.source)
        tokenizer = vocabulary.plain(hub.read_tokenizer(folder))
        tower = build.read(folder, "text", config.pooling, config.layers)
        licence = read_licence(folder)
        if config.vocabulary == "trim":
            tokenizer, rows = vocabulary.trim(tokenizer, captions)
            tower = build.with_rows(tower, config.pooling, tokenizer, rows)
    if config.narrow is not None:
        narrow.fit(tower, config.narrow)
    return build.TextPart(tower, tokenizer, licence)


def _started(config: TowerConfig) -> Any:
    """Build the configuration of a tower that starts at random, cut to its layers."""
    start = build.restore(dict(config.config or {}))
    if config.layers is not None:
        build.keep_layers(start, config.layers)
    return start
