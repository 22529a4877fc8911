"""Fusion models to train: on a dual encoder's towers, from scratch, or cut from a teacher."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ViltConfig, ViltForImageAndTextRetrieval, ViTImageProcessor

from crosstill import teachers
from crosstill.errors import ConfigError, ModelError
from crosstill.students import vocabulary
from crosstill.students.config import FusionConfig
from crosstill.students.student import RECORD, Student
from crosstill.teachers import hugging_face
from crosstill.teachers.dual import DualEncoder
from crosstill.teachers.matcher import Matcher
from crosstill.teachers.meter import CoAttention, Meter, Shape
from crosstill.teachers.meter.model import Parts
from crosstill.teachers.towers import drop_pooler
from crosstill.teachers.vilt import Vilt


def build(
    config: FusionConfig, captions: Sequence[str] = (), seed: int = 0, teacher: str | None = None
) -> Matcher:
    """Make the fusion model, ready to train.

    Args:
        config: what to make.
        captions: what a model from scratch learns its vocabulary from.
        seed: of all that starts at random.
        teacher: the folder that "cut" takes without a `source`.

    Raises:
        ConfigError: a shape or layer that cannot be.
        ModelError: a source that does not load, or is not of the kind that is needed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.fusion == "cut":
            return _cut(config, teacher)
        return _on_towers(config) if config.fusion == "meter" else _vilt(config, captions)


def _cut(config: FusionConfig, teacher: str | None) -> Matcher:
    source = config.source or teacher
    if source is None:
        raise ConfigError(
            f"student {config.name}: its source is missing, and the score cache has no teacher "
            "to cut; give the folder of a fusion model as source"
        )
    model = teachers.load(source)
    if not isinstance(model, Matcher):
        raise ModelError(f"{source}: no fusion model, so it has no fusion layers to cut")
    student = model.cut(config.layers)
    student.name = f"{model.name}, {student.depth} of {model.depth} layers"
    return student


def _on_towers(config: FusionConfig) -> Meter:
    parts, widths = _parts(str(config.towers), config.max_length)
    try:
        shape = Shape(**{**config.shape, **widths})
    except TypeError as error:
        raise ConfigError(f"student {config.name}: shape: {error}") from None
    return Meter(parts, CoAttention(shape), config.name)


def _parts(source: str, max_length: int) -> tuple[Parts, dict[str, int]]:
    """The towers of a dual encoder, and how wide their tokens are."""
    model = _dual(source)
    if isinstance(model, Student):
        towers: tuple[Any, Any] = model.image_tower, model.text_tower
        limit = model.config.max_length
    else:
        towers, limit = (model.model.vision_model, model.model.text_model), model.max_length
    for tower in towers:
        drop_pooler(tower)
    length = min(max_length, limit)
    parts = Parts(*towers, model.preprocess, model.tokenizer, length, model.licence)
    probe = Meter(parts, CoAttention(Shape(layers=1, width=1, heads=1, mlp=1)), "probe").eval()
    with torch.inference_mode():
        image = probe.look(torch.zeros(1, 3, *parts.preprocess.size, dtype=torch.uint8))
        text = probe.read(probe.tokenize(["a"]))
    widths = {"image_width": image.hidden.shape[2], "text_width": text.hidden.shape[2]}
    return parts, widths


def _dual(source: str) -> Student | DualEncoder:
    for folder in (Path(source), Path(source) / "best"):
        if (folder / RECORD).is_file():
            return Student.load(folder)
    model = teachers.load(source)
    if not isinstance(model, DualEncoder) or not hasattr(model.model, "vision_model"):
        raise ModelError(
            f"{source}: no dual encoder whose towers can be taken; give a student, a run or a "
            "folder such as CLIP's or VisionTextDualEncoder's"
        )
    return model


def _vilt(config: FusionConfig, captions: Sequence[str]) -> Vilt:
    """A ViLT at random, with words of the captions; written and read as any ViLT folder is."""
    values = {"vocab_size": 2000, "max_position_embeddings": config.max_length, **config.config}
    tokenizer = vocabulary.train(captions, values["vocab_size"])
    tokenizer.model_max_length = config.max_length
    try:
        model_config = ViltConfig(**{**values, "vocab_size": len(tokenizer)})
        with hugging_face.quiet():
            model = ViltForImageAndTextRetrieval(model_config)
    except Exception as error:  # TypeError, ValueError, ZeroDivisionError, ... by field
        line = " ".join(str(error).split())[:160]
        raise ConfigError(f"student {config.name}: config: {line}") from None
    side = model_config.image_size
    processor = ViTImageProcessor(size={"height": side, "width": side}, resample=3)
    with tempfile.TemporaryDirectory() as place, hugging_face.quiet():
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        processor.save_pretrained(place)
        student = Vilt(Path(place), config.name, torch.device("cpu"))
    student.source = None
    return student
