"""Hugging Face towers from their configuration alone, and back to it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from crosstill.errors import ConfigError
from crosstill.teachers import hugging_face

# norms after the hidden states, which only the pooler sees; most families have them before
_OF_POOLER = {"convnext": "layernorm.", "convnextv2": "layernorm."}


def assemble(config: Any, pooling: str) -> Any:
    """A tower as its configuration describes it, randomly started, without what is not used."""
    try:
        with hugging_face.quiet():
            tower = AutoModel.from_config(config, dtype=torch.float32)
    except Exception as error:  # KeyError, ValueError, TypeError, ... by model
        raise ConfigError(f"no tower can be built of this config ({error})") from None
    pooler = getattr(tower, "pooler", None)
    if pooling != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
        tower.pooler = None
    _leave_out(tower, pooling)
    return tower.to(memory_format=torch.channels_last)


def _leave_out(tower: Any, pooling: str) -> None:
    """No gradient for what no row depends on: several processes would wait for it in vain."""
    norm = _OF_POOLER.get(tower.config.model_type, "\0") if pooling != "pooler" else "\0"
    for name, value in tower.named_parameters():
        if name.endswith("mask_token") or name.startswith(norm):
            value.requires_grad_(False)


def describe(config: Any) -> dict[str, Any]:
    """A tower's configuration as plain JSON, from which `restore` builds an equal one."""
    record = json.loads(config.to_json_string(use_diff=False))
    return {k: v for k, v in record.items() if k not in ("_name_or_path", "transformers_version")}


def restore(record: dict[str, Any]) -> Any:
    """The configuration that `describe` recorded, or that a TOML file holds."""
    try:
        with hugging_face.quiet():
            return AutoConfig.for_model(**record)
    except Exception as error:  # unknown model types and values, by model
        line = " ".join(str(error).split())[:160]
        raise ConfigError(f"config of model_type {record['model_type']!r}: {line}") from None


def pool(output: Any, pooling: str, mask: Tensor | None = None) -> Tensor:
    """Hidden states (B, L, W), or (B, W, H, W') of a CNN, → (B, W).

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
