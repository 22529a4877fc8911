"""Small dual encoders: what they are made of, how they are built, saved and loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crosstill.data.pairs import read_licence
from crosstill.errors import ConfigError, MismatchError
from crosstill.images import Preprocess
from crosstill.students import student_config
from crosstill.students.student import Student
from crosstill.students.student_config import StudentConfig, load_config
from crosstill.towers import hub, processors, tower_parts, vocabulary

__all__ = ["build", "load", "load_config", "shorten"]

ALONE = 256  # embedding width where neither a teacher nor the configuration says one


def build(
    student: StudentConfig | str | Path,
    dim: int | None = None,
    captions: Sequence[str] = (),
    seed: int = 0,
) -> Student:
    """Build an untrained student.

    Args:
        student: a configuration, a preset's name, or a TOML file.
        dim: D, the width of the teacher's embeddings; None takes the configuration's, or 256
            for a student without a teacher.
        captions: the training captions, for vocabularies that are trimmed to or learnt from them.
        seed: of all that starts at random; equal seeds give equal weights. The caller's random
            state is left as it was.

    Raises:
        ConfigError: a configuration that cannot be, or that needs captions and got none.
        MismatchError: the configuration asks for another width than `dim`.
        ModelError: a source that does not load.
    """
    config = load_config(student) if isinstance(student, str | Path) else student
    if config.kind == "matcher":
        raise ConfigError(f"student {config.name}: a fusion model, which learns from a score cache")
    width = dim or config.dim or ALONE
    if width != (config.dim or width):
        raise MismatchError(
            f"student {config.name}: embedding width {config.dim} does not fit the teacher's "
            f"{dim}; leave dim out of the student, or choose another teacher"
        )
    if config.widths and config.widths[-1] > width:
        raise ConfigError(
            f"student {config.name}: widths up to {config.widths[-1]} do not fit embeddings "
            f"of {width}; give smaller ones"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image, text = image_part(config.image), text_part(config.text, captions)
        # Drawn anew, so that the heads do not depend on how the towers came about.
        torch.manual_seed(seed + 1)
        return Student(config.model_copy(update={"dim": width}), image, text)


def load(folder: str | Path) -> Student:
    """Load a student that was saved: see `crosstill.students.student.Student.load`."""
    return Student.load(Path(folder))


def shorten(student: Student, width: int) -> Student:
    """Cut a student to its first `width` numbers: the same towers under smaller heads.

    Of a student with several widths they lie along its axes. At its full width, the first w
    numbers of what this gives are, at length 1, the embedding of any width w.

    Raises:
        ConfigError: it is not that wide.
    """
    if not 0 < width <= student.dim:
        raise ConfigError(f"{student.name}: has embeddings of {student.dim}, not of {width}")
    name = student.name if width == student.dim else f"{student.name}@{width}"
    changes = {"dim": width, "widths": (), "name": name}
    training, licences = student.training, student.licences
    with torch.random.fork_rng():
        again = Student(
            student.config.model_copy(update=changes),
            tower_parts.ImagePart(student.image_tower, student.preprocess, licences["image"]),
            tower_parts.TextPart(student.text_tower, student.tokenizer, licences["text"]),
        ).to(student.device)
    axes = student.axes if student.config.widths else torch.eye(student.dim, device=student.device)
    for side in ("image_head", "text_head"):
        weights = getattr(student, side).state_dict().items()
        turned = {name: axes[:, :width].T @ value for name, value in weights}
        getattr(again, side).load_state_dict(turned)
    again.source = student.source
    return again.train(training)


def image_part(config: student_config.ImageTowerConfig) -> tower_parts.ImagePart:
    """Read or start an image tower.

    Its preprocess is that of its source (see `processors.fit`), but for what the configuration
    sets.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or pooled as asked.
    """
    if config.source is None:
        tower = tower_parts.assemble(_started(config), config.pooling)
        tower_parts.check_class_token(tower, config.pooling)
        preprocess = _chosen(processors.default(tower.config), config.preprocess)
        return tower_parts.ImagePart(tower, preprocess, None)
    folder = hub.locate(config.source)
    tower = tower_parts.read(folder, "image", config.pooling, config.layers)
    tower_parts.check_class_token(tower, config.pooling)
    preprocess = _chosen(processors.fit(folder, tower), config.preprocess)
    return tower_parts.ImagePart(tower, preprocess, read_licence(folder))


def _chosen(preprocess: Preprocess, config: student_config.PhotoConfig) -> Preprocess:
    """Put what a configuration sets in place of what a tower's folder says."""
    if config.resize == "squash":  # what bounds the sides before a crop has no meaning then
        preprocess = replace(preprocess, shorter=None, longer=None, multiple=1)
    return replace(preprocess, **config.model_dump(exclude_none=True))


def text_part(
    config: student_config.TextTowerConfig, captions: Sequence[str]
) -> tower_parts.TextPart:
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
        tower_parts.factor_table(tower, config.narrow)
    return tower_parts.TextPart(tower, tokenizer, licence)


def _started(config: student_config.TowerConfig) -> Any:
    """Build the configuration of a tower that starts at random, cut to its layers."""
    start = tower_parts.restore(dict(config.config or {}))
    if config.layers is not None:
        tower_parts.keep_layers(start, config.layers)
    return start
