"""OpenAI CLIP's image transformer, under its own parameter names: METER's image tower.

It gives every token, not one vector: the last LayerNorm runs over all of them, and there is no
projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.towers.build import grid_of


class Perceptron(nn.Module):
    """Two linear layers with x · sigmoid(1.702 x) between them."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, W) → (B, L, W)."""
        hidden = self.c_fc(tokens)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class Block(nn.Module):
    """Attention and perceptron, each on the normalised tokens and added to them."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = Perceptron(width, mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, W) → (B, L, W)."""
        seen = self.ln_1(tokens)
        tokens = tokens + self.attn(seen, seen, seen, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


class Transformer(nn.Module):
    """The blocks, under the name that the checkpoints give them."""

    def __init__(self, layers: int, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, W) → (B, L, W)."""
        for block in self.resblocks:
            tokens = block(tokens)
        return tokens


class ClipVisual(nn.Module):
    """CLIP's image transformer; the defaults are the released METER's at 384 pixels.

    Args:
        image_size: side of the square image, in pixels; a multiple of `patch_size`.
        patch_size: side of a patch, in pixels.
        width: W, of a token.
        layers: blocks; METER leaves out the last one of CLIP's twelve.
        heads: of each attention.
        mlp: width within the perceptrons.

    Attributes:
        config: these arguments; `ClipVisual(**config)` builds an equal one.

    Raises:
        ConfigError: the patches do not tile the image, or the heads do not divide the width.
    """

    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 11,
        heads: int = 12,
        mlp: int = 3072,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "mlp": mlp,
        }
        tokens = 1 + grid_of(image_size, patch_size) ** 2
        if width % heads:
            raise ConfigError(f"width = {width} is not a multiple of heads = {heads}")
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(layers, width, heads, mlp)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised (B, 3, image_size, image_size) → (B, 1 + patches, W), class token first."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(tokens)))
