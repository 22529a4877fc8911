"""ViLT (Kim et al., arXiv 2102.03334): one transformer over word and patch embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViltForImageAndTextRetrieval

from crosstill.images import normalise
from crosstill.teachers.pretrained import Pretrained
from crosstill.towers.build import additive
from crosstill.types import States


class Vilt(Pretrained):
    """`ViltForImageAndTextRetrieval`; its towers are its embeddings, all else is fusion.

    Every patch of an image is kept, in order, whatever `max_image_length` says: transformers
    draws patches at random, in random order, and attention does not care about order.
    """

    family = "vilt"
    kind = ViltForImageAndTextRetrieval

    def look(self, pixels: Tensor) -> States:
        parts = self.model.vilt.embeddings
        patches = parts.patch_embeddings(normalise(pixels, self.preprocess))  # (B, W, h, w)
        first, grid = parts.position_embeddings.split([1, parts.patch_embeddings.num_patches], 1)
        side = self.model.config.image_size // self.model.config.patch_size
        square = grid.transpose(1, 2).unflatten(2, (side, side))
        places = functional.interpolate(
            square, size=patches.shape[2:], mode="bilinear", align_corners=True
        )
        tokens = (patches + places).flatten(2).transpose(1, 2)
        whole = torch.cat([(parts.cls_token + first).expand(len(tokens), -1, -1), tokens], dim=1)
        hidden = parts.dropout(whole) + parts.token_type_embeddings.weight[1]
        return States(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.int64))

    def read(self, tokens: States) -> States:
        parts = self.model.vilt.embeddings
        hidden = parts.text_embeddings(input_ids=tokens.hidden)
        return States(hidden + parts.token_type_embeddings.weight[0], tokens.mask)

    def match(self, images: States, texts: States) -> Tensor:
        vilt = self.model.vilt
        hidden = torch.cat([texts.hidden, images.hidden], dim=1)
        mask = additive(torch.cat([texts.mask, images.mask], dim=1))
        hidden = vilt.encoder(hidden, attention_mask=mask).last_hidden_state
        pooled = vilt.pooler(vilt.layernorm(hidden[:, :1]))
        return self.model.rank_output(pooled).squeeze(1)

    def towers(self) -> list[nn.Module]:
        return [self.model.vilt.embeddings]

    @property
    def depth(self) -> int:
        return len(self.model.vilt.encoder.layer)

    def keep_layers(self, layers: Sequence[int]) -> None:
        encoder = self.model.vilt.encoder
        encoder.layer = nn.ModuleList(encoder.layer[layer] for layer in layers)
        self.model.config.num_hidden_layers = len(layers)

    @property
    def positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @property
    def activation(self) -> str:
        return str(self.model.config.hidden_act)
