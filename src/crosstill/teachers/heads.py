"""Contrastive heads of models that read pairs, as dual encoders: BLIP, BLIP-2 and BridgeTower.

BLIP         Li et al., arXiv 2201.12086: `BlipForImageTextRetrieval`, only where it is asked for
             by "dual:", because the same folder's fusion model is what a name alone means
BLIP-2       Li et al., arXiv 2301.12597: `Blip2ForImageTextRetrieval`
BridgeTower  Xu et al., arXiv 2206.08657: `BridgeTowerForContrastiveLearning`
"""

import logging
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Blip2ForImageTextRetrieval,
    BlipForImageTextRetrieval,
    BridgeTowerForContrastiveLearning,
)

from crosstill.errors import ModelError
from crosstill.teachers.dual import DualEncoder
from crosstill.towers import hub
from crosstill.towers.processors import check_size
from crosstill.towers.tower_parts import additive

PREFIX = "dual:"  # in front of a source: its contrastive heads, not what reads pairs
TYPES = {"text": 0, "image": 1}  # rows of the token type embeddings

_log = logging.getLogger(__name__)


class BlipDual(DualEncoder):
    """The dual encoder within a retrieval checkpoint: its towers and contrastive heads.

    The same folder's `Blip` re-ranks what this one finds.
    """

    def _read_model(self, config: Any) -> Any:
        check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # without an image to look at, the text encoder's cross-attention does nothing
        config.text_config.is_decoder = False
        model = hub.read_model(self.folder, config, kind=BlipForImageTextRetrieval)
        self.family = "blip-itc"
        return _BlipHeads(model).requires_grad_(False).to(self.device)


class _BlipHeads(nn.Module):
    """What `DualEncoder` asks of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.vision_model, self.vision_proj = model.vision_model, model.vision_proj
        self.text_encoder, self.text_proj = model.text_encoder, model.text_proj

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.vision_proj(hidden[:, 0])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.text_proj(output.last_hidden_state[:, 0])


class Blip2Dual(DualEncoder):
    """The dual encoder within a `Blip2ForImageTextRetrieval` folder, to an approximation.

    BLIP-2 gives Q unit rows for an image, one for each query, and its score is the greatest of
    their Q cosines with the text's row (its section 3.1). No single row has those cosines. The row
    here is the mean of the Q, at length 1: its cosine is the mean of the Q cosines over the length
    of that mean. Texts' rows are BLIP-2's own.
    """

    def _read_model(self, config: Any) -> Any:
        check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # older folders say so by another name, and the heads cannot do without
        config.qformer_config.use_qformer_text_input = True
        model = hub.read_model(self.folder, config, kind=Blip2ForImageTextRetrieval)
        self.family = "blip-2-itc-mean"
        _log.warning(
            "%s: an image's row is the mean of BLIP-2's %d query rows; BLIP-2 itself scores by the "
            "best of them",
            self.name,
            config.num_query_tokens,
        )
        return _Blip2Heads(model).requires_grad_(False).to(self.device)


class _Blip2Heads(nn.Module):
    """What `DualEncoder` asks of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        towers = model.config.vision_config, model.config.qformer_config
        self.config = SimpleNamespace(vision_config=towers[0], text_config=towers[1])
        self.vision_model, self.vision_projection = model.vision_model, model.vision_projection
        self.embeddings, self.text_projection = model.embeddings, model.text_projection
        self.qformer, self.query_tokens = model.qformer, model.query_tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state
        queries = self.query_tokens.expand(len(patches), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=patches)
        rows = self.vision_projection(hidden.last_hidden_state)
        return functional.normalize(rows, dim=-1).mean(dim=1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        words = self.embeddings(input_ids=input_ids)
        hidden = self.qformer(query_embeds=words, query_length=0, attention_mask=attention_mask)
        return self.text_projection(hidden.last_hidden_state[:, 0])


class BridgeTowerDual(DualEncoder):
    """The dual encoder within a `BridgeTowerForContrastiveLearning` folder."""

    def _read_model(self, config: Any) -> Any:
        check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # RoBERTa counts positions from behind its padding id
        limit = min(self.tokenizer.model_max_length, text_positions(config))
        self.tokenizer.model_max_length = limit
        kind = BridgeTowerForContrastiveLearning
        model = hub.read_model(self.folder, config, kind=kind)
        self.family = "bridgetower-itc"
        return _BridgeTowerHeads(model).requires_grad_(False).to(self.device)


class _BridgeTowerHeads(nn.Module):
    """What `DualEncoder` asks of a model, without the fusion layers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        core, self.config = model.bridgetower, model.config
        self.vision_model, self.text_model = core.vision_model, core.text_model
        self.transform, self.types = core.cross_modal_image_transform, core.token_type_embeddings
        self.image_head, self.text_head = model.itc_image_head, model.itc_text_head
        self.logit_scale = model.logit_scale

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        first = self.transform(image_outputs(self, pixel_values, 1)[:, 0, 0])
        return self.image_head(first + self.types.weight[TYPES["image"]])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        return self.text_head(text_outputs(self, input_ids, attention_mask, 1)[:, 0, 0])


def image_outputs(core: Any, values: Tensor, last: int) -> Tensor:
    """Run BridgeTower's image tower: normalised pixels → its last outputs (B, L, last, W)."""
    visual = core.vision_model.visual
    blocks = visual.transformer.resblocks[: len(core.text_model.encoder.layer)]
    first = visual.forward_pre(values)
    outputs = list(accumulate(blocks, lambda x, block: block(x), initial=first))
    return torch.stack([visual.forward_post(hidden) for hidden in outputs[-last:]], dim=2)


def text_outputs(core: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """Run BridgeTower's text tower: ids and mask (B, L) → its last outputs (B, L, last, W)."""
    text, added = core.text_model, additive(mask)
    first = text.embeddings(input_ids=ids)
    outputs = list(accumulate(text.encoder.layer, lambda x, layer: layer(x, added), initial=first))
    return torch.stack(outputs[-last:], dim=2)


def text_positions(config: Any) -> int:
    """Count the tokens that BridgeTower has positions for; RoBERTa counts from its padding id."""
    text = config.text_config
    return int(text.max_position_embeddings - (text.pad_token_id or 0) - 1)


# by the architecture that config.json names: always, and of models that also read pairs
_ALWAYS: dict[str, type[DualEncoder]] = {
    "BridgeTowerForContrastiveLearning": BridgeTowerDual,
    "Blip2ForImageTextRetrieval": Blip2Dual,
}
_ASKED: dict[str, type[DualEncoder]] = {**_ALWAYS, "BlipForImageTextRetrieval": BlipDual}


def holds(folder: Path) -> bool:
    """Whether a folder's model has contrastive heads, and no other part that a name would mean."""
    return any(name in _ALWAYS for name in hub.architectures(folder))


def has_heads(folder: Path) -> bool:
    """Whether a folder's model has contrastive heads, though it may read pairs too."""
    return any(name in _ASKED for name in hub.architectures(folder))


def load(folder: Path, name: str, device: torch.device | None = None) -> DualEncoder:
    """Load the contrastive heads of a folder's model as a dual encoder.

    Args:
        folder: of a model of transformers.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError: the model has no contrastive heads, or does not load.
    """
    heads = next((_ASKED[name] for name in hub.architectures(folder) if name in _ASKED), None)
    if heads is None:
        raise ModelError(
            f"{folder}: no model that reads pairs and has contrastive heads too; leave out {PREFIX}"
        )
    return heads(folder, name, device)
