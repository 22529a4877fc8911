"""Building of untrained students: towers are read or started, then get their heads."""

from collections.abc import Sequence
from typing import Any

import torch

from crosstill.data.pairs import read_licence
from crosstill.students.student import Student
from crosstill.students.student_config import (
    ImageTowerConfig,
    StudentConfig,
    TextTowerConfig,
    TowerConfig,
)
from crosstill.towers import hub, narrow, processors, tower_parts, vocabulary


def assemble(config: StudentConfig, captions: Sequence[str], seed: int) -> Student:
    """Build an untrained student; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image = image_part(config.image)
        text = text_part(config.text, captions)
        # Drawn anew, so that the heads do not depend on how the towers came about.
        torch.manual_seed(seed + 1)
        return Student(config, image, text)


def image_part(config: ImageTowerConfig) -> tower_parts.ImagePart:
    """Read or start an image tower; its preprocess is that of its source: see `processors.fit`.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or pooled as asked.
    """
    if config.source is None:
        tower = tower_parts.assemble(_started(config), config.pooling)
        tower_parts.check_class_token(tower, config.pooling)
        return tower_parts.ImagePart(tower, processors.default(tower.config), None)
    folder = hub.locate(config.source)
    tower = tower_parts.read(folder, "image", config.pooling, config.layers)
    tower_parts.check_class_token(tower, config.pooling)
    return tower_parts.ImagePart(tower, processors.fit(folder, tower), read_licence(folder))


def text_part(config: TextTowerConfig, captions: Sequence[str]) -> tower_parts.TextPart:
    """Read or start a text tower; the captions train or trim its vocabulary.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or trimmed as asked.
    """
    licence = None
    if config.source is None:
        start = _started(config)
        tokenizer = vocabulary.train(captions, start.vocab_size)
        tower_parts.name_tokens(start, tokenizer)
        tower = tower_parts.assemble(start, config.pooling)
    else:
        folder = hub.locate(config.source)
        tokenizer = vocabulary.plain(hub.read_tokenizer(folder))
        tower = tower_parts.read(folder, "text", config.pooling, config.layers)
        licence = read_licence(folder)
        if config.vocabulary == "trim":
            tokenizer, rows = vocabulary.trim(tokenizer, captions)
            tower = tower_parts.with_rows(tower, config.pooling, tokenizer, rows)
    if config.narrow is not None:
        narrow.fit(tower, config.narrow)
    return tower_parts.TextPart(tower, tokenizer, licence)


def _started(config: TowerConfig) -> Any:
    """Build the configuration of a tower that starts at random, cut to its layers."""
    start = tower_parts.restore(dict(config.config or {}))
    if config.layers is not None:
        tower_parts.keep_layers(start, config.layers)
    return start
