"""BLIP (Li et al., arXiv 2201.12086): a text encoder that looks at the image in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval

from crosstill.images import normalise
from crosstill.teachers.dual import DualEncoder
from crosstill.teachers.pretrained import Pretrained, log_odds
from crosstill.towers import hub
from crosstill.towers.processors import check_size
from crosstill.types import States


class Blip(Pretrained):
    """`BlipForImageTextRetrieval` with its matching head.

    The vision model is its one tower: the text encoder is the fusion part, so of a text only the
    token ids are kept. The head has two classes; the score is the log-odds of "match", the
    difference of its logits, of which a sigmoid gives the probability. The text begins with the
    tokenizer's own first token, as transformers has it (the authors' code puts [ENC] there).
    """

    family = "blip"
    kind = BlipForImageTextRetrieval

    def __init__(self, folder: Path, name: str, device: torch.device | None = None) -> None:
        super().__init__(folder, name, device)
        # of the dual heads, which are kept for saving only, no score comes
        self.model.vision_proj.requires_grad_(False)
        self.model.text_proj.requires_grad_(False)

    def look(self, pixels: Tensor) -> States:
        values = normalise(pixels, self.preprocess)
        hidden = self.model.vision_model(pixel_values=values).last_hidden_state
        return States(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.int64))

    def read(self, tokens: States) -> States:
        return tokens

    def match(self, images: States, texts: States) -> Tensor:
        output = self.model.text_encoder(
            input_ids=texts.hidden,
            attention_mask=texts.mask,
            encoder_hidden_states=images.hidden,
            encoder_attention_mask=images.mask,
        )
        return log_odds(self.model.itm_head(output.last_hidden_state[:, 0]))

    def towers(self) -> list[nn.Module]:
        return [self.model.vision_model]

    @property
    def depth(self) -> int:
        return len(self.model.text_encoder.encoder.layer)

    def keep_layers(self, layers: Sequence[int]) -> None:
        encoder = self.model.text_encoder.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        self.model.config.text_config.num_hidden_layers = len(layers)

    @property
    def positions(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def activation(self) -> str:
        config = self.model.config
        return f"{config.vision_config.hidden_act}/{config.text_config.hidden_act}"


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
        return _Heads(model).requires_grad_(False).to(self.device)


class _Heads(nn.Module):
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
