"""Hugging Face towers: read, cut to their first layers, rebuilt from their configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from crosstill.data.base import read_licence
from crosstill.errors import ConfigError, ModelError
from crosstill.images import Preprocess
from crosstill.students import narrow, photos, vocabulary
from crosstill.students.config import ImageTowerConfig, TextTowerConfig, TowerConfig
from crosstill.teachers import hugging_face
from crosstill.teachers.towers import assemble, describe, restore

_HALVES = {"image": "vision", "text": "text"}  # what transformers calls them in a dual encoder
_STAGES = ("depths", "num_block_repeats")  # some count their blocks as num_hidden_layers, too
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
    """Read or start an image tower; its preprocess is that of its source: see `photos.fit`.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or pooled as asked.
    """
    if config.source is None:
        tower = assemble(_started(config), config.pooling)
        _check_class_token(tower, config.pooling)
        return ImagePart(tower, photos.default(tower.config), None)
    folder = hugging_face.locate(config.source)
    tower = _read(folder, config, "image")
    _check_class_token(tower, config.pooling)
    return ImagePart(tower, photos.fit(folder, tower), read_licence(folder))


def text_part(config: TextTowerConfig, captions: Sequence[str]) -> TextPart:
    """Read or start a text tower; the captions train or trim its vocabulary.

    Raises:
        ConfigError, ModelError: a tower that cannot be built, read, cut or trimmed as asked.
    """
    licence = None
    if config.source is None:
        start = _started(config)
        tokenizer = vocabulary.train(captions, start.vocab_size)
        _name_tokens(start, tokenizer)
        tower = assemble(start, config.pooling)
    else:
        folder = hugging_face.locate(config.source)
        tokenizer = vocabulary.plain(hugging_face.read_tokenizer(folder))
        tower, licence = _read(folder, config, "text"), read_licence(folder)
        if config.vocabulary == "trim":
            tokenizer, rows = vocabulary.trim(tokenizer, captions)
            tower = _with_rows(tower, config.pooling, tokenizer, rows)
    if config.narrow is not None:
        narrow.fit(tower, config.narrow)
    return TextPart(tower, tokenizer, licence)


def token_embeddings(tower: Any) -> nn.Module:
    """The table of a text tower that has a row for each token."""
    found: nn.Module = tower.get_input_embeddings()
    return found


def _check_class_token(tower: Any, pooling: str) -> None:
    names = [name for name, _ in tower.named_parameters()]
    if pooling == "cls" and not any("cls_token" in n or "class_embedding" in n for n in names):
        raise ConfigError(
            f'pooling = "cls": a {tower.config.model_type} has no class token; '
            'use "pooler" or "mean"'
        )


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
    try:
        model = hugging_face.read_model(folder, whole, may_lack=lack)
    except ModelError as error:
        hint = '; set the pooling to "mean" or "cls"' if "pooler." in str(error) else ""
        raise ModelError(f"{error}{hint}") from None
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
    staged = any(getattr(config, name, None) for name in _STAGES)
    if staged or not isinstance(held, int):
        what = "stages, and no layers" if staged else "no layers"
        raise ConfigError(f"layers = {layers}: a {config.model_type} has {what} to choose from")
    if layers > held:
        raise ConfigError(f"layers = {layers}: the model has only {held}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def _with_rows(
    tower: Any, pooling: str, tokenizer: PreTrainedTokenizerFast, rows: list[int]
) -> Any:
    """The tower with only those rows of its token embeddings.

    Raises:
        ModelError: it would say something else, as where a token's number counts as such.
    """
    table = tower.get_input_embeddings()
    name = next(name for name, module in tower.named_modules() if module is table)
    weights = tower.state_dict()
    weights[f"{name}.weight"] = table.weight.detach()[rows]
    config = restore(describe(tower.config))
    _renumber(config, tokenizer, rows)
    small = assemble(config, pooling)
    small.load_state_dict(weights)
    ids = torch.arange(min(len(rows), 12))[None]
    with torch.inference_mode():
        before = tower.eval()(input_ids=torch.tensor(rows)[ids]).last_hidden_state
        after = small.eval()(input_ids=ids).last_hidden_state
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"a trimmed vocabulary would change what this {config.model_type} says; "
            'set vocabulary = "full"'
        )
    return small


def _renumber(config: Any, tokenizer: PreTrainedTokenizerFast, rows: list[int]) -> None:
    """Bring the size and the token ids that a text configuration mentions up to date."""
    config.vocab_size = len(rows)
    places: dict[int | None, int] = {old: new for new, old in enumerate(rows)}
    special = set(tokenizer.all_special_ids)
    for name in _TOKEN_IDS:
        place = places.get(getattr(config, f"{name}_token_id", None))
        # CLIP's old configurations name an id that is no special token, and mean another rule.
        if place in special:
            setattr(config, f"{name}_token_id", place)


def _name_tokens(config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tell a new text tower the ids of its new tokenizer, where it has a place for them."""
    config.vocab_size = len(tokenizer)
    own = {name: getattr(tokenizer, f"{name}_token_id") for name in _TOKEN_IDS}
    own |= {"bos": own["cls"], "eos": own["sep"]}  # other words for the first and the last token
    for name, place in own.items():
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", place)
