"""Fusion models to train: on a dual encoder's towers, from scratch, or cut from a teacher."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltForImageAndTextRetrieval, ViTImageProcessorPil

from crosstill import files
from crosstill.errors import ConfigError, ModelError, unknown
from crosstill.fusion.families import Vilt
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.meter import CoAttention, Meter, Parts, Shape
from crosstill.models import open as open_model
from crosstill.progress import quiet
from crosstill.students.student import Student
from crosstill.students.student_config import FusionConfig, load_config
from crosstill.teachers.dual import DualEncoder
from crosstill.towers import tower_parts, vocabulary


def build(
    student: FusionConfig | str | Path,
    captions: Sequence[str] = (),
    seed: int = 0,
    teacher: str | None = None,
) -> Matcher:
    """Build a fusion model to train.

    Args:
        student: a configuration, "half", or a TOML file with the key `fusion`.
        captions: what a model from scratch learns its vocabulary from.
        seed: of all that starts at random.
        teacher: the folder of the fusion model that a "cut" without a `source` is cut from.

    Raises:
        ConfigError: a shape or layer that cannot be, or a configuration of a dual encoder.
        ModelError: a source that does not load, or is not of the kind that is needed.
    """
    config = load_config(student) if isinstance(student, str | Path) else student
    if config.kind != "matcher":
        raise ConfigError(f"student {config.name}: a dual encoder, not a fusion model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.fusion == "cut":
            return _cut(config, teacher)
        return _on_towers(config) if config.fusion == "meter" else _vilt(config, captions)


def _cut(config: FusionConfig, teacher: str | None) -> Matcher:
    source = config.source or teacher
    if source is None:
        raise ConfigError(
            f"student {config.name}: the score cache has no teacher to cut; make it with a fusion "
            'teacher, or give a TOML file with fusion = "cut" and source = the model\'s folder'
        )
    model: Any = open_model(source)
    if model.kind != "matcher":
        raise ModelError(f"{source}: no fusion model, so it has no fusion layers to cut")
    student = model.cut(config.layers)
    student.name = f"{model.name}, {student.depth} of {model.depth} layers"
    return student


def _on_towers(config: FusionConfig) -> Meter:
    dual = _dual(str(config.towers))
    parts = _parts(dual, config.max_length)
    probe = Meter(parts, CoAttention(Shape(layers=1, width=1, heads=1, mlp=1)), "probe").eval()
    image, text = _widths(probe)
    known = set(Shape.__dataclass_fields__) - {"image_width", "text_width"}
    for key in config.shape.keys() - known:
        raise ConfigError(f"student {config.name}: {unknown('key of shape', key, known)}")
    shape = Shape(**config.shape, image_width=image, text_width=text)
    model = Meter(parts, CoAttention(shape), config.name)
    heads = _heads(dual)
    if config.start == "joint" and heads is not None:
        begin_in_joint_space(model.fusion, heads)
    return model


def _parts(dual: Student | DualEncoder, max_length: int) -> Parts:
    """Take the towers of a dual encoder, pooled as it pools them."""
    if isinstance(dual, Student):
        towers: tuple[Any, Any] = dual.image_tower, tower_parts.with_whole_table(dual.text_tower)
        pooling, limit = (
            (dual.config.image.pooling, dual.config.text.pooling),
            dual.config.max_length,
        )
    else:
        towers, limit = (dual.model.vision_model, dual.model.text_model), dual.max_length
        pooling = "pooler", "pooler"
    length = min(max_length, limit)
    return Parts(*towers, dual.preprocess, dual.tokenizer, length, dual.licence, *pooling)


def _heads(dual: Student | DualEncoder) -> tuple[Tensor, Tensor] | None:
    """Return the heads from pooled image and text to the joint space: (D, W) each, or None."""
    of = dual if isinstance(dual, Student) else dual.model
    names = (("image_head", "text_head"), ("visual_projection", "text_projection"))
    for pair in names:
        heads = [getattr(of, name, None) for name in pair]
        if all(isinstance(head, nn.Linear) for head in heads):
            image, text = (head.weight.detach() for head in heads if head is not None)
            return image, text
    return None


def _widths(model: Meter) -> tuple[int, int]:
    """Measure the width of the towers' tokens."""
    pixels = torch.zeros(1, 3, *model.preprocess.size, dtype=torch.uint8)
    with torch.inference_mode():
        image, text = model.encode_images(pixels), model.encode_texts(model.tokenize(["a"]))
    return image.hidden.shape[2], text.hidden.shape[2]


def begin_in_joint_space(stack: CoAttention, heads: tuple[Tensor, Tensor]) -> None:
    """Start co-attention where the dual encoder already compares image and text.

    Both transforms become the dual encoder's heads, seen along the directions in which the heads
    are largest; queries and keys of cross-attention begin near the identity, so that what matches
    is looked at. From random layers the same model had learnt almost nothing by the time that
    this one had learnt most (docs/log.md).

    Args:
        stack: what to change; its width is W.
        heads: (D, image width) and (D, text width).
    """
    width = stack.shape.width
    basis = torch.linalg.svd(torch.cat(heads, dim=1), full_matrices=False)[0][:, :width].T
    transforms = stack.cross_modal_image_transform, stack.cross_modal_text_transform
    with torch.no_grad():
        for transform, head in zip(transforms, heads, strict=True):
            transform.weight[: len(basis)] = basis @ head  # a wider stack keeps some random rows
        for layer in [*stack.cross_modal_image_layers, *stack.cross_modal_text_layers]:
            looks = layer.crossattention.self
            for part, share in ((looks.query, 1.0), (looks.key, 1.0), (looks.value, 0.5)):
                part.weight += share * torch.eye(width)


def _dual(source: str) -> Student | DualEncoder:
    model: Any = open_model(source)
    if isinstance(model, Student) or hasattr(getattr(model, "model", None), "vision_model"):
        return model
    raise ModelError(
        f"{source}: no dual encoder whose towers can be taken; give a student, a run or a "
        "folder such as CLIP's or VisionTextDualEncoder's"
    )


def _vilt(config: FusionConfig, captions: Sequence[str]) -> Vilt:
    """Build a random ViLT with words of the captions, written and read as any ViLT folder is."""
    values = {"vocab_size": 2000, "max_position_embeddings": config.max_length, **config.config}
    tokenizer = vocabulary.train(captions, values["vocab_size"])
    tokenizer.model_max_length = config.max_length
    try:
        model_config = ViltConfig(**{**values, "vocab_size": len(tokenizer)})
        with quiet():
            model = ViltForImageAndTextRetrieval(model_config)
    except Exception as error:  # TypeError, ValueError, ZeroDivisionError, ... by field
        line = " ".join(str(error).split())[:160]
        raise ConfigError(f"student {config.name}: config: {line}") from None
    side = model_config.image_size
    processor = ViTImageProcessorPil(size={"height": side, "width": side}, resample=3)
    size = 4 * model.num_parameters()
    with (
        files.writing(Path(tempfile.gettempdir()), size),
        tempfile.TemporaryDirectory() as place,
        quiet(),
    ):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        processor.save_pretrained(place)
        student = Vilt(Path(place), config.name, torch.device("cpu"))
    student.source = None
    return student
