"""Hugging Face towers: read from a folder, cut to their first layers, rebuilt, narrowed, pooled."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from crosstill.errors import ConfigError, ModelError
from crosstill.images import Preprocess
from crosstill.progress import quiet
from crosstill.towers import hub

_HALVES = {"image": "vision", "text": "text"}  # what transformers calls them in a dual encoder
_STAGES = ("depths", "num_block_repeats")  # some count their blocks as num_hidden_layers, too
# norms after the hidden states, which only the pooler sees; most families have them before
_OF_POOLER = {"convnext": "layernorm.", "convnextv2": "layernorm."}
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


def token_embeddings(tower: Any) -> nn.Module:
    """Return the table of a text tower that has a row for each token."""
    table: nn.Module = tower.get_input_embeddings()
    return table


def check_class_token(tower: Any, pooling: str) -> None:
    """Refuse to pool a tower by a class token that it does not have.

    Raises:
        ConfigError: the pooling is "cls" and the tower has no class token.
    """
    names = [name for name, _ in tower.named_parameters()]
    if pooling == "cls" and not any("cls_token" in n or "class_embedding" in n for n in names):
        raise ConfigError(
            f'pooling = "cls": a {tower.config.model_type} has no class token; '
            'use "pooler" or "mean"'
        )


def read(folder: Path, side: str, pooling: str, layers: int | None = None) -> Any:
    """Read the tower of a folder; of a dual encoder's folder, its image or its text tower.

    Args:
        folder: where config.json and the safetensors lie.
        side: "image" or "text".
        pooling: how its hidden states are pooled: see `pool`.
        layers: keep the first n transformer layers; None keeps all.

    Raises:
        ConfigError: it has no such layers.
        ModelError: it does not load, or lacks parameters.
    """
    whole = hub.read_config(folder)
    half = getattr(whole, f"{_HALVES[side]}_config", None)
    wanted = whole if half is None else half
    if layers is not None:
        keep_layers(wanted, layers)
    lack = ("pooler.",) if pooling != "pooler" else ()
    try:
        model = hub.read_model(folder, whole, may_lack=lack)
    except ModelError as error:
        hint = '; set the pooling to "mean" or "cls"' if "pooler." in str(error) else ""
        raise ModelError(f"{error}{hint}") from None
    if half is not None:
        model = getattr(model, f"{_HALVES[side]}_model")
    tower = assemble(model.config, pooling)
    weights = model.state_dict()
    report = tower.load_state_dict(weights, strict=False)
    if report.missing_keys:
        raise ModelError(f"{folder}: cannot take the {side} tower out of {type(model).__name__}")
    return tower


def keep_layers(config: Any, layers: int) -> None:
    """Cut a configuration to its first n layers; the weights of the others are not read.

    Raises:
        ConfigError: the model has fewer layers, or stages in place of layers.
    """
    depth = getattr(config, "num_hidden_layers", None)
    staged = any(getattr(config, name, None) for name in _STAGES)
    if staged or not isinstance(depth, int):
        what = "stages, and no layers" if staged else "no layers"
        raise ConfigError(f"layers = {layers}: a {config.model_type} has {what} to choose from")
    if layers > depth:
        raise ConfigError(f"layers = {layers}: the model has only {depth}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def with_rows(tower: Any, pooling: str, tokenizer: PreTrainedTokenizerFast, rows: list[int]) -> Any:
    """Copy a text tower with only some rows of its token embeddings.

    Raises:
        ModelError: its output would change, as where a token's number has a meaning.
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


def name_tokens(config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the ids of a new tokenizer into the configuration of a new text tower."""
    config.vocab_size = len(tokenizer)
    own = {name: getattr(tokenizer, f"{name}_token_id") for name in _TOKEN_IDS}
    own |= {"bos": own["cls"], "eos": own["sep"]}  # other words for the first and the last token
    for name, place in own.items():
        if getattr(config, f"{name}_token_id", None) is not None:
            setattr(config, f"{name}_token_id", place)


def assemble(config: Any, pooling: str) -> Any:
    """Build a tower from its configuration, with random weights, without unused parts."""
    try:
        with quiet():
            tower = AutoModel.from_config(config, dtype=torch.float32)
    except Exception as error:  # KeyError, ValueError, TypeError, ... by model
        raise ConfigError(f"no tower can be built of this config ({error})") from None
    pooler = getattr(tower, "pooler", None)
    if pooling != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
        tower.pooler = None
    # parameters that no row depends on are frozen: several processes would wait for them
    norm = _OF_POOLER.get(tower.config.model_type, "\0") if pooling != "pooler" else "\0"
    for name, value in tower.named_parameters():
        if name.endswith("mask_token") or name.startswith(norm):
            value.requires_grad_(False)
    return tower.to(memory_format=torch.channels_last)


def describe(config: Any) -> dict[str, Any]:
    """Return a tower's configuration as plain JSON, from which `restore` builds an equal one."""
    record = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in record.items() if k not in ("_name_or_path", "transformers_version")}


def restore(record: dict[str, Any]) -> Any:
    """Build the configuration that `describe` recorded, or that a TOML file holds."""
    try:
        with quiet():
            return AutoConfig.for_model(**record)
    except Exception as error:  # unknown model types and values, by model
        line = " ".join(str(error).split())[:160]
        raise ConfigError(f"config of model_type {record['model_type']!r}: {line}") from None


def pool(output: Any, pooling: str, mask: Tensor | None = None) -> Tensor:
    """Pool hidden states (B, L, W), or (B, W, H, W') of a CNN, to (B, W).

    Args:
        output: what the tower returned.
        pooling: "pooler", "cls" (the first position), or "mean".
        mask: (B, L), 1 where a position counts for the mean.
    """
    hidden: Tensor = output.last_hidden_state
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ConfigError('this tower has no pooler; set its pooling to "mean" or "cls"')
        return pooled.flatten(1)
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


class Factored(nn.Module):
    """A token table as the product of two thin ones: token ids (B, L) → (B, L, r) → (B, L, W).

    Most of a small text tower is its table of tokens (V, W). The best product (V, r) (r, W) is its
    truncated singular value decomposition (Eckart and Young, 1936): the squared error is the sum of
    the squares of the singular values that are left out. ALBERT (arXiv 1909.11942, section 3.1) is
    trained with such a table from the start.

    Args:
        tokens: V.
        rank: r.
        width: W.
        padding: the token that stays as it is in training, if any.
    """

    def __init__(self, tokens: int, rank: int, width: int, padding: int | None) -> None:
        super().__init__()
        self.narrow = nn.Embedding(tokens, rank, padding_idx=padding)
        self.wide = nn.Linear(rank, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.wide(self.narrow(ids))
        return rows

    @torch.no_grad()
    def table(self) -> Tensor:
        """Multiply both: (V, W)."""
        return self.narrow.weight @ self.wide.weight.T


def factor_table(tower: Any, rank: int) -> None:
    """Put the best two thin tables in the place of a text tower's table of tokens.

    Raises:
        ConfigError: the table has no more than `rank` columns or rows.
    """
    table = tower.get_input_embeddings().weight.detach()
    if rank > min(table.shape):
        raise ConfigError(
            f"narrow = {rank}: the token table is {table.shape[0]} x {table.shape[1]}; "
            "give less than both"
        )
    left, values, right = torch.linalg.svd(table.double(), full_matrices=False)
    root = values[:rank].sqrt()
    factored = put_factored(tower, rank)
    with torch.no_grad():
        factored.narrow.weight.copy_(left[:, :rank] * root)
        factored.wide.weight.copy_(right[:rank].T * root)


def put_factored(tower: Any, rank: int) -> Factored:
    """Put two thin tables with random numbers there, for weights that are loaded next."""
    old = tower.get_input_embeddings()
    factored = Factored(old.num_embeddings, rank, old.embedding_dim, old.padding_idx)
    tower.set_input_embeddings(factored)
    return factored


def with_whole_table(tower: Any) -> Any:
    """Copy a tower as its family knows it: thin tables are multiplied, others stay."""
    again = copy.deepcopy(tower)
    if any(isinstance(module, Factored) for module in again.modules()):
        table = again.get_input_embeddings()
        again.set_input_embeddings(
            nn.Embedding.from_pretrained(table.table(), padding_idx=table.narrow.padding_idx)
        )
    return again


def additive(mask: Tensor) -> Tensor:
    """Turn a mask (B, L), 1 where real, into what is added to attention scores (B, 1, 1, L)."""
    return (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min


def resized_positions(table: Tensor, grid: int) -> Tensor:
    """Resize positions to another grid of patches: (1 + G·G, W) → (1 + grid·grid, W).

    Row 0, the class token's, stays; the others are a picture of the old grid, resized bicubically.
    """
    side = math.isqrt(len(table) - 1)
    picture = table[1:].T.reshape(1, -1, side, side)
    picture = nn.functional.interpolate(picture, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], picture[0].flatten(1).T])


def grid_of(image_size: int, patch_size: int) -> int:
    """Count the patches along a side of an image, both sizes in pixels.

    Raises:
        ConfigError: they do not tile it.
    """
    if image_size < 1 or image_size % patch_size:
        raise ConfigError(f"image_size = {image_size} is not a multiple of patches of {patch_size}")
    return image_size // patch_size
