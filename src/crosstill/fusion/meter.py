"""METER-shaped fusion models: two towers, and a stack of co-attention layers for each stream.

Dou et al., "An Empirical Study of Training End-to-End Vision-and-Language Transformers", arXiv
2111.02387; the teacher of DCD (arXiv 2207.01426). The towers may be any two.

In the stack a text layer and an image layer of one depth both read the previous depth's outputs:
each attends to its own stream, then to the other, then goes through its own perceptron (post-norm).
METER's own image tower is OpenAI CLIP's. It gives every token, not one vector: the last LayerNorm
runs over all of them, and there is no projection. Parameters have the names of the released files.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from crosstill import artefacts
from crosstill.errors import ConfigError
from crosstill.fusion.matcher import Matcher
from crosstill.images import Preprocess, normalise
from crosstill.towers import hub, tower_parts
from crosstill.towers.tower_parts import grid_of
from crosstill.types import States

RECORD = "matcher.json"
CLIP_VISUAL = "openai-vit"  # model_type of METER's own image tower in a record
EPS = 1e-12  # of every LayerNorm in the stack; the towers have their own
MASKED = -10_000.0  # added to the score of a padded key; exp of it is 0 in float32


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack; the defaults are the released one's.

    Raises:
        ConfigError: a size below 1, or a width that the heads do not divide.
    """

    layers: int = 6
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    image_width: int = 768  # of the image tower's tokens
    text_width: int = 768
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = {k: v for k, v in asdict(self).items() if k != "dropout"}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} = {size}: must be at least 1")
        if self.width % self.heads:
            raise ConfigError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout}: must be at least 0 and below 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Projections(nn.Module):
    """Queries, keys and values of multi-head attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(shape.width, shape.width) for _ in range(3))
        self.heads, self.dropout = shape.heads, shape.dropout

    def forward(self, own: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        """Attend from (B, Q, W) to (B, K, W) under an additive (B, 1, 1, K) mask → (B, Q, W)."""
        query, key, value = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, own), (self.key, other), (self.value, other))
        )
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, mask, dropout)
        return attended.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """Linear, dropout, and the residual's LayerNorm."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.dense = nn.Linear(width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=EPS)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """(B, Q, width) and (B, Q, W) → (B, Q, W)."""
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class Attention(nn.Module):
    """One attention with its residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self = Projections(shape)  # the checkpoints' name, for looking at others too
        self.output = Output(shape.width, shape)

    def forward(self, own: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        """As `Projections`, with the residual added."""
        return self.output(self.self(own, other, mask), own)


class Intermediate(nn.Module):
    """The perceptron's first half."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.width, shape.mlp)

    def forward(self, states: Tensor) -> Tensor:
        """(B, Q, W) → (B, Q, mlp)."""
        return functional.gelu(self.dense(states))


@dataclass(frozen=True)
class Stream:
    """One side's tokens within the stack."""

    states: Tensor  # (B, L, W)
    mask: Tensor  # additive (B, 1, 1, L)


class Layer(nn.Module):
    """One stream's layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(shape), Attention(shape)
        self.intermediate, self.output = Intermediate(shape), Output(shape.mlp, shape)

    def forward(self, own: Stream, other: Stream, queries: int | None = None) -> Stream:
        """Compute this stream after one depth.

        Args:
            own: this stream after the previous depth.
            other: the other stream after the previous depth.
            queries: compute the first so many tokens only; None computes all.
        """
        states = own.states[:, :queries]
        states = self.attention(states, own.states, own.mask)
        states = self.crossattention(states, other.states, other.mask)
        return Stream(self.output(self.intermediate(states), states), own.mask)


class Pooler(nn.Module):
    """Token 0 through a linear layer and tanh."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.width, shape.width)

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, W) → (B, W)."""
        return torch.tanh(self.dense(states[:, 0]))


class CoAttention(nn.Module):
    """Everything of METER above its towers.

    Attributes:
        shape: as given; its `layers` are those that a cut keeps.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.cross_modal_text_transform = nn.Linear(shape.text_width, shape.width)
        self.cross_modal_image_transform = nn.Linear(shape.image_width, shape.width)
        self.token_type_embeddings = nn.Embedding(2, shape.width)
        self.cross_modal_image_layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.cross_modal_text_layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.cross_modal_image_pooler = Pooler(shape)
        self.cross_modal_text_pooler = Pooler(shape)
        self.rank_output = nn.Linear(2 * shape.width, 1)
        self.apply(_start)

    def project(self, tokens: Tensor, side: str) -> Tensor:
        """Bring a tower's tokens (B, L, tower's width) to the stack's width and add their type."""
        types = self.token_type_embeddings.weight
        if side == "text":
            return self.cross_modal_text_transform(tokens) + types[0]
        return self.cross_modal_image_transform(tokens) + types[1]

    def forward(self, image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Score how well image i fits text i: projected (B, L, W) with masks (B, L) → (B,) logits.

        Only token 0 of each stream is pooled, so the last depth computes no other.
        """
        images, texts = Stream(image, _additive(image_mask)), Stream(text, _additive(text_mask))
        both = zip(self.cross_modal_image_layers, self.cross_modal_text_layers, strict=True)
        for depth, (of_image, of_text) in enumerate(both, start=1):
            queries = 1 if depth == self.shape.layers else None
            images, texts = (
                of_image(images, texts, queries),
                of_text(texts, images, queries),
            )
        pooled = (
            self.cross_modal_text_pooler(texts.states),
            self.cross_modal_image_pooler(images.states),
        )
        return self.rank_output(torch.cat(pooled, dim=1))[:, 0]


def _additive(mask: Tensor) -> Tensor:
    """Turn a mask (B, L) of 1 and 0 into (B, 1, 1, L) of 0 and -10,000, to add to scores."""
    return ((1 - mask) * MASKED)[:, None, None, :]


def _start(module: nn.Module) -> None:
    """Initialise as BERT does: normal weights of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


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
        """Return a tower's tokens (B, L, W), the pooled vector in front unless it is token 0."""
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
    def load(cls, folder: Path, device: torch.device | None = None) -> Self:
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
