"""BEiT-3's two branches and retrieval heads, under the names of its checkpoints.

Wang et al., "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language
Tasks", arXiv 2208.10442. At every multiway point `A` holds the weights of images and `B` those of
texts. Retrieval runs the two apart: what is fused, where both meet in one attention, is not here.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from crosstill.errors import ConfigError
from crosstill.towers.tower_parts import grid_of

IMAGE, TEXT = "A", "B"


@dataclass(frozen=True)
class Shape:
    """What decides the shapes of a BEiT-3; the defaults are base at 224 pixels.

    Attributes:
        width: W, of a token and of an embedding.
        layers: how many there are.
        heads: of each attention.
        mlp: width within the feed-forward networks.
        patch: side of a patch, in pixels.
        image_size: side of the square image, in pixels; a multiple of `patch`.
        words: rows of the word table.
        places: rows of the texts' position table; the first two are never read.

    Raises:
        ConfigError: sizes that do not divide each other.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    patch: int = 16
    image_size: int = 224
    words: int = 64010
    places: int = 1024

    def __post_init__(self) -> None:
        if not self.heads or self.width % self.heads:
            raise ConfigError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        if self.places < 5:
            raise ConfigError(f"places = {self.places} leaves no room for a word")
        grid_of(self.image_size, self.patch)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


# "giant" has the paper's sizes, but no file of it was ever public; the paper's giant also shares
# its attention between images and texts, which files of this layout do not.
SIZES = {
    "base": Shape(),
    "large": Shape(width=1024, layers=24, heads=16, mlp=4096),
    "giant": Shape(width=1408, layers=40, heads=16, mlp=6144, patch=14),
}


def _multiway(make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({IMAGE: make(), TEXT: make()})


class Attention(nn.Module):
    """Multi-head attention with a LayerNorm before its output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = _multiway(lambda: nn.Linear(width, width))
        self.v_proj = _multiway(lambda: nn.Linear(width, width))
        self.q_proj = _multiway(lambda: nn.Linear(width, width))
        self.out_proj = _multiway(lambda: nn.Linear(width, width))
        self.inner_attn_ln = _multiway(lambda: nn.LayerNorm(width))

    def forward(self, tokens: Tensor, way: str, seen: Tensor | None) -> Tensor:
        """(B, L, W) → (B, L, W); `seen` (B, 1, 1, L) is False where a key is padding."""
        q, k, v = (
            part[way](tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out_proj[way](self.inner_attn_ln[way](mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with GELU and a LayerNorm between them."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.ffn_layernorm = nn.LayerNorm(mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, W) → (B, L, W)."""
        return self.fc2(self.ffn_layernorm(functional.gelu(self.fc1(tokens))))


class Layer(nn.Module):
    """Attention and feed-forward, each on the normalised tokens and added to them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape.width, shape.heads)
        self.self_attn_layer_norm = _multiway(lambda: nn.LayerNorm(shape.width))
        self.ffn = _multiway(lambda: FeedForward(shape.width, shape.mlp))
        self.final_layer_norm = _multiway(lambda: nn.LayerNorm(shape.width))

    def forward(self, tokens: Tensor, way: str, seen: Tensor | None) -> Tensor:
        """As `Attention.forward`."""
        tokens = tokens + self.self_attn(self.self_attn_layer_norm[way](tokens), way, seen)
        return tokens + self.ffn[way](self.final_layer_norm[way](tokens))


class Encoder(nn.Module):
    """Positions, layers and a last LayerNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        patches = grid_of(shape.image_size, shape.patch) ** 2
        # two rows that are never read, one for the class token, one a patch
        images, texts = (nn.Embedding(n, shape.width) for n in (3 + patches, shape.places))
        self.embed_positions = nn.ModuleDict({IMAGE: images, TEXT: texts})
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.layer_norm = _multiway(lambda: nn.LayerNorm(shape.width))

    def forward(self, tokens: Tensor, way: str, seen: Tensor | None = None) -> Tensor:
        """Embedded (B, L, W) → the first token's last state (B, W)."""
        places = torch.arange(2, 2 + tokens.shape[1], device=tokens.device)
        tokens = tokens + self.embed_positions[way](places)
        for layer in self.layers:
            tokens = layer(tokens, way, seen)
        return self.layer_norm[way](tokens[:, 0])


class VisionEmbedding(nn.Module):
    """Patches and the class token; the mask token is of pretraining and never read."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, values: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) → (B, 1 + patches, W)."""
        patches = self.proj(values).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(patches), 1, -1), patches], dim=1)


class Trunk(nn.Module):
    """All but the heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.text_embed = nn.Embedding(shape.words, shape.width)
        self.vision_embed = VisionEmbedding(shape.width, shape.patch)
        self.encoder = Encoder(shape)


class Network(nn.Module):
    """BEiT-3 for retrieval; its state dict has the names, shapes and order of the checkpoints.

    Args:
        shape: the sizes.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.beit3 = Trunk(shape)
        self.language_head = nn.Linear(shape.width, shape.width, bias=False)
        self.vision_head = nn.Linear(shape.width, shape.width, bias=False)

    def embed_image(self, values: Tensor) -> Tensor:
        """Normalised (B, 3, S, S) → (B, W), not yet of unit length."""
        tokens = self.beit3.vision_embed(values)
        return self.vision_head(self.beit3.encoder(tokens, IMAGE))

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask (B, L), 0 where padded, → (B, W), not yet of unit length."""
        tokens = self.beit3.text_embed(ids)
        return self.language_head(self.beit3.encoder(tokens, TEXT, mask.bool()[:, None, None]))

    def parameters_by_part(self) -> dict[str, int]:
        """How many parameters either side has, and all there are."""
        counts = {"image": 0, "text": 0}
        for name, value in self.named_parameters():
            words = set(name.split("."))
            if words & {IMAGE, "vision_embed", "vision_head"}:
                counts["image"] += value.numel()
            elif words & {TEXT, "text_embed", "language_head"}:
                counts["text"] += value.numel()
        return {**counts, "total": sum(p.numel() for p in self.parameters())}
