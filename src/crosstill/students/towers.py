"""Hugging Face towers: read, cut to their first layers, rebuilt from their configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from crosstill.data.base import read_licence
from crosstill.errors import ConfigError, ModelError
from crosstill.images import Preprocess
from crosstill.students import vocabulary
from crosstill.students.config import ImageTowerConfig, TextTowerConfig, TowerConfig
from crosstill.teachers import hugging_face
from crosstill.teachers.towers import assemble, describe, restore

_HALVES = {"image": "vision", "text": "text"}  # what transformers calls them in a dual encoder
_TOKEN_IDS = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


@dataclass(frozen=True)
class ImagePart:
    """An image tower and how it wants its pixels."""

    tower: nn.Module
    preprocess: Preprocess
    licence: str | None


@dataclass(frozen=True)
class TextPart:
    """A text tower and the tokenizer that its embeddings belong to."""

    tower: nn.Module
    tokenizer: PreTrainedTokenizerFast
    licence: str | None


def image_part(config: ImageTowerConfig) -> ImagePart:
    """Read or start an image tower.

    The preprocess is that of its source; without one, or with one that we cannot repeat, photos
    are squashed to the tower's `image_size` and scaled to -1..1.
    """
    if config.source is None:
        tower = assemble(_started(config), config.pooling)
        return ImagePart(tower, _default_preprocess(tower.config), None)
    folder = hugging_face.locate(config.source)
    tower = _read(folder, config, "image")
    try:
        preprocess = hugging_face.read_preprocess(folder)
    except ModelError:
        preprocess = _default_preprocess(tower.config)
    return ImagePart(tower, preprocess, read_licence(folder))


def text_part(config: TextTowerConfig, captions: Sequence[str]) -> TextPart:
    """Read or start a text tower; the captions train or trim its vocabulary."""
    if config.source is None:
        start = _started(config)
        tokenizer = vocabulary.train(captions, start.vocab_size)
        _renumber(start, len(tokenizer), tokenizer)
        return TextPart(assemble(start, config.pooling), tokenizer, None)
    folder = hugging_face.locate(config.source)
    tokenizer = vocabulary.plain(hugging_face.read_tokenizer(folder))
    tower = _read(folder, config, "text")
    if config.vocabulary == "trim":
        tokenizer, rows = vocabulary.trim(tokenizer, captions)
        tower = _with_rows(tower, config.pooling, tokenizer, rows)
    return TextPart(tower, tokenizer, read_licence(folder))


def token_embeddings(tower: Any) -> nn.Embedding:
    """The table of a text tower that has a row for each token."""
    return tower.get_input_embeddings()


def _started(config: TowerConfig) -> Any:
    record = dict(config.config or {})
    start = restore(record)
    if config.layers is not None:
        _keep_layers(start, config.layers)
    return start


def _read(folder: Path, config: TowerConfig, kind: str) -> Any:
    """The folder's tower; of a dual encoder, the half that is asked for."""
    whole = hugging_face.read_config(folder)
    half = getattr(whole, f"{_HALVES[kind]}_config", None)
    wanted = whole if half is None else half
    if config.layers is not None:
        _keep_layers(wanted, config.layers)
    lack = ("pooler.",) if config.pooling != "pooler" else ()
    model = hugging_face.read_model(folder, whole, may_lack=lack)
    if half is not None:
        model = getattr(model, f"{_HALVES[kind]}_model")
    tower = assemble(model.config, config.pooling)
    weights = model.state_dict()
    report = tower.load_state_dict(weights, strict=False)
    if report.missing_keys:
        raise ModelError(f"{folder}: cannot take the {kind} tower out of {type(model).__name__}")
    return tower


def _keep_layers(config: Any, layers: int) -> None:
    """Ask for the first n layers only; the weights of the others are then left unread."""
    held = getattr(config, "num_hidden_layers", None)
    if not isinstance(held, int):
        raise ConfigError(f"layers = {layers}: a {config.model_type} has no layers to choose from")
    if layers > held:
        raise ConfigError(f"layers = {layers}: the model has only {held}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _with_rows(
    tower: Any, pooling: str, tokenizer: PreTrainedTokenizerFast, rows: list[int]
) -> nn.Module:
    """The tower with only those rows of its token embeddings."""
    table = token_embeddings(tower)
    name = next(name for name, module in tower.named_modules() if module is table)
    weights = tower.state_dict()
    weights[f"{name}.weight"] = table.weight.detach()[rows]
    config = restore(describe(tower.config))
    _renumber(config, len(rows), tokenizer, rows)
    small = assemble(config, pooling)
    small.load_state_dict(weights)
    return small


def _renumber(
    config: Any, size: int, tokenizer: PreTrainedTokenizerFast, rows: list[int] | None = None
) -> None:
    """Bring the size and the token ids that a text configuration mentions up to date."""
    config.vocab_size = size
    places: dict[int | None, int] = {old: new for new, old in enumerate(rows or range(size))}
    special = set(tokenizer.all_special_ids)
    for name in _TOKEN_IDS:
        place = places.get(getattr(config, f"{name}_token_id", None))
        # CLIP's old configurations name an id that is no special token, and mean another rule.
        if place in special:
            setattr(config, f"{name}_token_id", place)


def _default_preprocess(config: Any) -> Preprocess:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocess(size=(int(height), int(width)))
