"""METER-shaped fusion models: two towers, and a stack of co-attention layers for each stream.

Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv
2111.02387; the teacher of DCD (arXiv 2207.01426). The towers may be any two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crosstill import artefacts
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.meter_network import ClipVisual, CoAttention, Shape
from crosstill.images import Preprocess, normalise
from crosstill.towers import hub, tower_parts
from crosstill.types import States

RECORD = "matcher.json"
CLIP_VISUAL = "openai-vit"  # model_type of METER's own image tower in a record


@dataclass(frozen=True)
class Parts:
    """What a METER-shaped model stands on, besides its stack."""

    image_tower: nn.Module  # normalised pixels (B, 3, H, W) → (B, L, W), or a Hugging Face tower
    text_tower: nn.Module  # a Hugging Face text model
    preprocess: Preprocess
    tokenizer: Any
    max_length: int
    licence: str | None = None
    image_pooling: str = "cls"
    text_pooling: str = "cls"


class Meter(Matcher):
    """Two towers, two co-attention streams, a rank head.

    Token 0 of each stream is what the stack's poolers read. A tower that is pooled in another
    way than by its first token ("mean", "pooler") gets what it is pooled to in front.

    Args:
        parts: towers, preprocess and tokenizer.
        fusion: the stack.
        name: what to call it in tables.
    """

    family = "meter"

    def __init__(self, parts: Parts, fusion: CoAttention, name: str) -> None:
        super().__init__()
        self.image_tower, self.text_tower = parts.image_tower, parts.text_tower
        self.fusion = fusion
        self.name, self.source = name, None
        self.preprocess, self.licence = parts.preprocess, parts.licence
        self.tokenizer, self.max_length = parts.tokenizer, parts.max_length
        self._pooling = {"image": parts.image_pooling, "text": parts.text_pooling}

    def encode_images(self, pixels: Tensor) -> States:
        values = normalise(pixels, self.preprocess).contiguous(memory_format=torch.channels_last)
        if isinstance(self.image_tower, ClipVisual):
            tokens = self.image_tower(values)
        else:
            tokens = self._tokens(self.image_tower(pixel_values=values), "image", None)
        return States(tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.int64))

    def encode_texts(self, tokens: States) -> States:
        output = self.text_tower(input_ids=tokens.hidden, attention_mask=tokens.mask)
        states = self._tokens(output, "text", tokens.mask)
        added = states.shape[1] - tokens.mask.shape[1]
        return States(states, functional.pad(tokens.mask, (added, 0), value=1))

    def _tokens(self, output: Any, side: str, mask: Tensor | None) -> Tensor:
        """A tower's tokens (B, L, W), what it is pooled to in front unless that is the first."""
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # a CNN's (B, W, H, W')
            hidden = hidden.flatten(2).transpose(1, 2)
        if self._pooling[side] == "cls":
            return hidden
        pooled = tower_parts.pool(output, self._pooling[side], mask)
        return torch.cat([pooled[:, None], hidden], dim=1)

    def project(self, states: States, side: str) -> States:
        return States(self.fusion.project(states.hidden, side), states.mask)

    def score_states(self, images: States, texts: States) -> Tensor:
        return self.fusion(*images, *texts)

    def towers(self) -> list[nn.Module]:
        return [self.image_tower, self.text_tower]

    @property
    def depth(self) -> int:
        return self.fusion.shape.layers

    def keep_layers(self, layers: Sequence[int]) -> None:
        stack = self.fusion
        for name in ("cross_modal_image_layers", "cross_modal_text_layers"):
            modules = getattr(stack, name)
            setattr(stack, name, nn.ModuleList(modules[layer] for layer in layers))
        stack.shape = replace(stack.shape, layers=len(layers))

    @property
    def activation(self) -> str:
        text = getattr(self.text_tower.config, "hidden_act", "none")
        image = "quick_gelu"
        if not isinstance(self.image_tower, ClipVisual):
            image = getattr(self.image_tower.config, "hidden_act", "none")
        return f"{image}/{text}/gelu"

    def save(self, folder: Path) -> None:
        described = {
            "image": _describe(self.image_tower),
            "text": tower_parts.describe(self.text_tower.config),
        }
        record = {
            "family": self.family,
            "name": self.name,
            "shape": self.fusion.shape.to_json(),
            "towers": described,
            "pooling": self._pooling,
            "preprocess": self.preprocess.to_json(),
            "max_length": self.max_length,
            "licence": self.licence,
        }
        hub.save(folder, RECORD, record, self.state_dict(), self.tokenizer)

    @classmethod
    def load(cls, folder: Path, device: torch.device | None = None) -> Meter:
        """Read what `save` wrote, in eval mode.

        Raises:
            ModelError: the folder holds no such model.
            CorruptError: one of its files was damaged; it is named.
        """
        record, weights, tokenizer = hub.read_saved(folder, RECORD)
        with artefacts.readable(folder / RECORD), torch.random.fork_rng():
            parts = Parts(
                image_tower=_restore(record["towers"]["image"], record["pooling"]["image"]),
                text_tower=_restore(record["towers"]["text"], record["pooling"]["text"]),
                preprocess=Preprocess.from_json(record["preprocess"]),
                tokenizer=tokenizer,
                max_length=record["max_length"],
                licence=record["licence"],
                image_pooling=record["pooling"]["image"],
                text_pooling=record["pooling"]["text"],
            )
            model = cls(parts, CoAttention(Shape(**record["shape"])), record["name"])
        with hub.fitting(folder, "model"):
            model.load_state_dict(weights)
        model.source = str(folder.absolute())
        where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return model.freeze_towers().to(where).eval()


def _describe(tower: nn.Module) -> dict[str, Any]:
    if isinstance(tower, ClipVisual):
        return {"model_type": CLIP_VISUAL, **tower.config}
    return tower_parts.describe(tower.config)


def _restore(record: dict[str, Any], pooling: str) -> nn.Module:
    if record["model_type"] == CLIP_VISUAL:
        return ClipVisual(**{k: v for k, v in record.items() if k != "model_type"})
    return tower_parts.assemble(tower_parts.restore(record), pooling)
