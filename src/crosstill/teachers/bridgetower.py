"""BridgeTower (Xu et al., arXiv 2206.08657): bridges from the towers' last layers into fusion."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BridgeTowerForContrastiveLearning, BridgeTowerForImageAndTextRetrieval

from crosstill.errors import ConfigError
from crosstill.images import normalise
from crosstill.teachers.dual import DualEncoder
from crosstill.teachers.pretrained import Pretrained, log_odds
from crosstill.towers import hub
from crosstill.towers.build import additive
from crosstill.towers.processors import check_size
from crosstill.types import States

_TYPES = {"text": 0, "image": 1}  # rows of the token type embeddings


class BridgeTower(Pretrained):
    """`BridgeTowerForImageAndTextRetrieval` with its matching head.

    The towers do not look at each other. Fusion layer k of S reads, through its bridge, the k-th
    of the last S outputs of either tower: S stages of every token are kept, (B, L, S, W). The
    score is the log-odds of "match", of which a sigmoid gives the probability.
    """

    family = "bridgetower"
    kind = BridgeTowerForImageAndTextRetrieval

    def look(self, pixels: Tensor) -> States:
        values = normalise(pixels, self.preprocess)
        hidden = _see(self.model.bridgetower, values, self.depth)
        return States(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.int64))

    def read(self, tokens: States) -> States:
        return States(_read(self.model.bridgetower, *tokens, self.depth), tokens.mask)

    def enter(self, states: States, side: str) -> States:
        core = self.model.bridgetower
        # the towers' states of a deeper model, from which this one was cut, have more stages
        hidden = states.hidden[:, :, -self.depth :]
        transform = getattr(core, f"cross_modal_{side}_transform")
        if isinstance(transform, nn.ModuleList):
            pairs = zip(transform, hidden.unbind(2), strict=True)
            hidden = torch.stack([layer(stage) for layer, stage in pairs], dim=2)
        else:
            hidden = transform(hidden)
        hidden = hidden + core.token_type_embeddings.weight[_TYPES[side]]
        first = getattr(core, f"cross_modal_{side}_layernorm")(hidden[:, :, :1])
        return States(torch.cat([first, hidden[:, :, 1:]], dim=2), states.mask)

    def match(self, images: States, texts: States) -> Tensor:
        core, mask = self.model.bridgetower, additive(texts.mask)
        image, text = images.hidden[:, :, 0], texts.hidden[:, :, 0]
        for k in range(self.depth):
            if k:
                bridges = core.cross_modal_image_link_tower, core.cross_modal_text_link_tower
                image = bridges[0][k - 1](images.hidden[:, :, k], image, None)
                text = bridges[1][k - 1](texts.hidden[:, :, k], text, None)
            # each stream reads what the other was before this layer
            layers = core.cross_modal_image_layers[k], core.cross_modal_text_layers[k]
            image, text = (
                layers[0](image, text, encoder_attention_mask=mask)[0],
                layers[1](text, image, attention_mask=mask)[0],
            )
        return log_odds(self.model.itm_score(core.get_cls_features(text, image)))

    def towers(self) -> list[nn.Module]:
        return [self.model.bridgetower.vision_model, self.model.bridgetower.text_model]

    @property
    def depth(self) -> int:
        return len(self.model.bridgetower.cross_modal_text_layers)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Keep these with the bridges into them; the first needs none.

        n layers read the towers' last n outputs, as transformers numbers them, so that a layer
        may read a later one than it was trained on.

        Raises:
            ConfigError: layer 0, into which no bridge leads, does not come first.
        """
        if 0 in layers[1:]:
            raise ConfigError(
                f"layers = {list(layers)}: no bridge leads into layer 0 of {self.name}; put it "
                "first, or leave it out"
            )
        core = self.model.bridgetower
        for side in _TYPES:
            _select(core, f"cross_modal_{side}_layers", layers)
            _select(core, f"cross_modal_{side}_transform", layers)
            _select(core, f"cross_modal_{side}_link_tower", [layer - 1 for layer in layers[1:]])
        self.model.config.num_hidden_layers = len(layers)

    @property
    def positions(self) -> int:
        return _positions(self.model.config)

    @property
    def activation(self) -> str:
        return f"quick_gelu/{self.model.config.text_config.hidden_act}"


class BridgeTowerDual(DualEncoder):
    """The dual encoder within a `BridgeTowerForContrastiveLearning` folder."""

    def _read_model(self, config: Any) -> Any:
        check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # RoBERTa counts positions from behind its padding id
        limit = min(self.tokenizer.model_max_length, _positions(config))
        self.tokenizer.model_max_length = limit
        kind = BridgeTowerForContrastiveLearning
        model = hub.read_model(self.folder, config, kind=kind)
        self.family = "bridgetower-itc"
        return _Heads(model).requires_grad_(False).to(self.device)


class _Heads(nn.Module):
    """What `DualEncoder` asks of a model, without the fusion layers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        core, self.config = model.bridgetower, model.config
        self.vision_model, self.text_model = core.vision_model, core.text_model
        self.transform, self.types = core.cross_modal_image_transform, core.token_type_embeddings
        self.image_head, self.text_head = model.itc_image_head, model.itc_text_head
        self.logit_scale = model.logit_scale

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        first = self.transform(_see(self, pixel_values, 1)[:, 0, 0])
        return self.image_head(first + self.types.weight[_TYPES["image"]])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        return self.text_head(_read(self, input_ids, attention_mask, 1)[:, 0, 0])


def _see(core: Any, values: Tensor, last: int) -> Tensor:
    """Normalised pixels (B, 3, H, W) → the image tower's last outputs, (B, L, last, W)."""
    visual = core.vision_model.visual
    blocks = visual.transformer.resblocks[: len(core.text_model.encoder.layer)]
    first = visual.forward_pre(values)
    outputs = list(accumulate(blocks, lambda x, block: block(x), initial=first))
    return torch.stack([visual.forward_post(hidden) for hidden in outputs[-last:]], dim=2)


def _read(core: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """Token ids and mask (B, L) → the text tower's last outputs, (B, L, last, W)."""
    text, added = core.text_model, additive(mask)
    first = text.embeddings(input_ids=ids)
    outputs = list(accumulate(text.encoder.layer, lambda x, layer: layer(x, added), initial=first))
    return torch.stack(outputs[-last:], dim=2)


def _select(core: Any, name: str, rows: Sequence[int]) -> None:
    """Keep some of a list of modules; what is no list is shared by all layers and stays."""
    held = getattr(core, name)
    if isinstance(held, nn.ModuleList):
        setattr(core, name, nn.ModuleList(held[row] for row in rows))


def _positions(config: Any) -> int:
    text = config.text_config
    return int(text.max_position_embeddings - (text.pad_token_id or 0) - 1)
