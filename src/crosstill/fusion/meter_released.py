"""METER's released checkpoints, and DCD's: which tensor belongs where, and what does not fit.

Everything is said in the file's own names. Sizes are read from the tensors, so that a small model
under the same names loads as the released ones do; attention heads are always 64 wide.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from crosstill.errors import ConfigError, ModelError
from crosstill.fusion.meter import RECORD, ClipVisual, CoAttention, Meter, Parts, Shape
from crosstill.pixels import Preprocess
from crosstill.teachers.checkpoints import Findings, compare, count_layers, usual_size
from crosstill.towers import hub, tower_parts
from crosstill.towers.tower_parts import grid_of, resized_positions

__all__ = ["RECORD", "examine", "is_released", "load", "read_folder", "sizes"]

HEAD = 64  # width of an attention head
LENGTH = 40  # tokens of a caption in METER's retrieval settings
PAD = 1  # the id of RoBERTa's padding; it counts positions by it
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# what is told of a part's sizes, under the names of ClipVisual, transformers and Shape
_SIZES = (
    "model_type",
    "image_size",
    "patch_size",
    "layers",
    "num_hidden_layers",
    "width",
    "hidden_size",
    "heads",
    "num_attention_heads",
    "mlp",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_VISUAL = "vit_model.visual."
_TEXT = "text_transformer.embeddings."
# first letters of our names → of the file's
_PREFIXES = {
    "image_tower.": _VISUAL,
    "text_tower.": "text_transformer.",
    "fusion.": "",
}
# what DCD's student has of its own; towers, transforms and token types are its teacher's
_STACK = (
    "cross_modal_image_layers.",
    "cross_modal_text_layers.",
    "cross_modal_image_pooler.",
    "cross_modal_text_pooler.",
    "rank_output.",
)
_STUDENT_PREFIXES = {f"fusion.{part}": f"stu_{part}" for part in _STACK} | _PREFIXES

_CLIP_TEXT = "CLIP's text side, which METER does not run"
# first letters of what a file may hold beside the model → why it is not read
LEFTOVERS = {
    "vit_model.positional_embedding": _CLIP_TEXT,
    "vit_model.ln_final.": _CLIP_TEXT,
    "vit_model.token_embedding.weight": _CLIP_TEXT,
    "text_transformer.embeddings.position_ids": "a row of numbers, computed anew",
    "text_transformer.pooler.": "RoBERTa's pooler, which METER does not run",
    "itm_score.fc.": "the matching head; its row 1 is the rank head where a file has none",
    "mlm_score.": "the masked-word head of pretraining",
}
_OF_STUDENT = {f"stu_{part}": "DCD's student, read with --student" for part in _STACK}
_OF_TEACHER = {part: "the stack of the student's teacher" for part in _STACK}


def is_released(names: Iterable[str]) -> bool:
    """Tell by the names of the stack whether these are METER's parameter names."""
    return any(re.match(r"(stu_)?cross_modal_(image|text)_layers\.", name) for name in names)


def examine(tensors: Mapping[str, Tensor], student: bool = False) -> tuple[Meter, Findings]:
    """Compare a released state dict with the model that its sizes describe.

    Args:
        tensors: the file's, under its names; only their shapes are looked at.
        student: look at DCD's student (`stu_*`) instead of its teacher.

    Returns:
        that model on the meta device, and what does not fit.

    Raises:
        ModelError: these are not METER's names, or no model has such sizes.
    """
    stack = "stu_cross_modal_" if student else "cross_modal_"
    if not any(name.startswith(f"{stack}image_layers.") for name in tensors):
        raise ModelError(
            f"no tensor named {stack}image_layers.*: not "
            + ("a checkpoint with DCD's student" if student else "a METER checkpoint")
        )
    with torch.device("meta"):
        model = _build(tensors, student)
    return model, _compare(model, _completed(tensors, student), student)


def load(
    tensors: Mapping[str, Tensor],
    tokenizer: Path,
    name: str,
    student: bool = False,
    image_size: int | None = None,
) -> Meter:
    """Build the model of a released state dict, in float32 and eval mode, its towers frozen.

    Args:
        tensors: the file's, under its names, on one device; they are copied.
        tokenizer: the folder of RoBERTa's tokenizer.
        name: what to call the model in tables.
        student: read DCD's student (`stu_*`) instead of its teacher.
        image_size: in pixels, of the images; None keeps the file's own.

    Raises:
        ModelError: something is missing, unexpected or of another shape; or the tokenizer is
            another model's.
        ConfigError: the patches do not tile images of that size.
    """
    _, findings = examine(tensors, student)
    if not findings.whole:
        raise ModelError(f"{name}: {findings.summary()}; list them with `crosstill inspect`")
    given = _completed(tensors, student)
    if image_size is not None:
        grid = grid_of(image_size, given[f"{_VISUAL}conv1.weight"].shape[-1])
        table = given[f"{_VISUAL}positional_embedding"]
        given[f"{_VISUAL}positional_embedding"] = resized_positions(table.float(), grid)
    words = _read_tokenizer(tokenizer, len(given[f"{_TEXT}word_embeddings.weight"]))
    with torch.random.fork_rng(), next(iter(given.values())).device:
        model = _build(given, student)
    model.name, model.tokenizer = name, words
    model.load_state_dict(
        {ours: given[released] for ours, released in _released_names(model, student)}
    )
    return model.freeze_towers().eval()


def read_folder(folder: Path) -> Meter:
    """Load a folder that was converted before."""
    return Meter.load(folder, torch.device("cpu"))


def sizes(model: Meter) -> dict[str, dict[str, Any]]:
    """Return what decides the shapes of a METER, by part; Hugging Face towers name themselves."""
    image, text = model.image_tower, tower_parts.describe(model.text_tower.config)
    described = (
        image.config if isinstance(image, ClipVisual) else tower_parts.describe(image.config)
    )
    stack = model.fusion.shape.to_json()
    return {
        "image": {name: described[name] for name in _SIZES if name in described},
        "text": {name: text[name] for name in _SIZES if name in text},
        "fusion": {name: size for name, size in stack.items() if name in _SIZES},
    }


def _read_tokenizer(folder: Path, words: int) -> Any:
    tokenizer = hub.read_tokenizer(folder)
    if tokenizer.pad_token_id != PAD or len(tokenizer) > words:
        raise ModelError(
            f"{folder}: {len(tokenizer)} tokens with padding {tokenizer.pad_token_id}, where the "
            f"checkpoint has {words} with padding {PAD}; give the tokenizer of roberta-base"
        )
    return tokenizer


def _build(tensors: Mapping[str, Tensor], student: bool) -> Meter:
    """Build a random model of the sizes that the tensors show, without a tokenizer."""
    try:
        image = ClipVisual(**_image_sizes(tensors))
        text = RobertaModel(_text_config(tensors), add_pooling_layer=False)
        widths = image.config["width"], text.config.hidden_size
        stack = CoAttention(_stack_shape(tensors, "stu_" if student else "", *widths))
    except (AssertionError, ConfigError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:160]
        raise ModelError(f"the tensors' shapes make no METER ({line})") from None
    size = image.config["image_size"]
    parts = Parts(
        image_tower=image,
        text_tower=text,
        preprocess=Preprocess(size=(size, size), resize="crop", mean=CLIP_MEAN, std=CLIP_STD),
        tokenizer=None,
        max_length=min(LENGTH, text.config.max_position_embeddings - PAD - 1),
    )
    return Meter(parts, stack, "meter")


def _image_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    blocks = r"vit_model\.visual\.transformer\.resblocks\.(\d{1,4})\."
    width = usual_size(tensors, rf"{blocks}ln_\d\.(weight|bias)", 0, 768)
    patch = usual_size(tensors, r"vit_model\.visual\.conv1\.weight", 3, 16)
    tokens = usual_size(tensors, r"vit_model\.visual\.positional_embedding", 0, 577)
    return {
        "image_size": math.isqrt(tokens - 1) * patch,
        "patch_size": patch,
        "width": width,
        "layers": count_layers(tensors, blocks, 11),
        "heads": _heads(width),
        "mlp": usual_size(tensors, rf"{blocks}mlp\.c_fc\.(weight|bias)", 0, 3072),
    }


def _text_config(tensors: Mapping[str, Tensor]) -> RobertaConfig:
    embeddings = r"text_transformer\.embeddings\."
    layers = r"text_transformer\.encoder\.layer\.(\d{1,4})\."
    width = usual_size(tensors, rf"{layers}output\.LayerNorm\.(weight|bias)", 0, 768)
    return RobertaConfig(
        vocab_size=usual_size(tensors, rf"{embeddings}word_embeddings\.weight", 0, 50265),
        max_position_embeddings=usual_size(
            tensors, rf"{embeddings}position_embeddings\.weight", 0, 514
        ),
        type_vocab_size=1,
        hidden_size=width,
        num_hidden_layers=count_layers(tensors, layers, 12),
        num_attention_heads=_heads(width),
        intermediate_size=usual_size(
            tensors, rf"{layers}intermediate\.dense\.(weight|bias)", 0, 3072
        ),
        layer_norm_eps=1e-5,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
    )


def _stack_shape(
    tensors: Mapping[str, Tensor], prefix: str, image_width: int, text_width: int
) -> Shape:
    layers = rf"{prefix}cross_modal_(?:image|text)_layers\.(\d{{1,4}})\."
    width = usual_size(tensors, rf"{layers}output\.LayerNorm\.(weight|bias)", 0, 768)
    return Shape(
        layers=count_layers(tensors, layers, 6),
        width=width,
        heads=_heads(width),
        mlp=usual_size(tensors, rf"{layers}intermediate\.dense\.(weight|bias)", 0, 3072),
        image_width=image_width,
        text_width=text_width,
    )


def _heads(width: int) -> int:
    if not width or width % HEAD:
        raise ConfigError(f"width {width} is not a multiple of {HEAD}")
    return width // HEAD


def _completed(tensors: Mapping[str, Tensor], student: bool) -> dict[str, Tensor]:
    """Add a rank head where a file has none: METER takes row 1 of the matching head."""
    given = dict(tensors)
    if student or any(name.startswith("rank_output.") for name in given):
        return given
    for part in ("weight", "bias"):
        head = given.get(f"itm_score.fc.{part}")
        if head is not None and head.ndim and len(head) == 2:
            given[f"rank_output.{part}"] = head[1:]
    return given


def _released_names(model: Meter, student: bool) -> list[tuple[str, str]]:
    """List the model's parameter names, each with its name in a released file."""
    prefixes = _STUDENT_PREFIXES if student else _PREFIXES
    pairs = []
    for ours in model.state_dict():
        start = next(prefix for prefix in prefixes if ours.startswith(prefix))
        pairs.append((ours, prefixes[start] + ours.removeprefix(start)))
    return pairs


def _compare(model: Meter, given: Mapping[str, Tensor], student: bool) -> Findings:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {released: shapes[ours] for ours, released in _released_names(model, student)}
    return compare(wanted, given, LEFTOVERS | (_OF_TEACHER if student else _OF_STUDENT))
