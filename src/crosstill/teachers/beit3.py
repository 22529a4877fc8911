"""BEiT-3 as a teacher: its network, its tokenizer, and a folder that `inspect --out` wrote.

Wang et al., "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language
Tasks", arXiv 2208.10442. Retrieval runs its two branches apart: what is fused, where both meet in
one attention, is not here. The folder:

    beit3.json           format, name, sizes; seals itself and holds the SHA-256 of the others
    model.safetensors    the weights in float32, under their released names
    beit3.spm            the tokenizer
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crosstill import artefacts, extras, files
from crosstill.data.pairs import read_licence
from crosstill.errors import ConfigError, ModelError
from crosstill.formats import encodable
from crosstill.images import Preprocess, normalise
from crosstill.teachers.base import TwoTowers, tensors_digest
from crosstill.towers import hub
from crosstill.towers.tower_parts import grid_of

RECORD, PIECES = "beit3.json", "beit3.spm"
LENGTH = 64  # ids of a caption in the released retrieval settings
IMAGE, TEXT = "A", "B"  # whose weights a multiway point holds, in the checkpoints' names
# ids of the tokenizer; any other piece has its SentencePiece id plus one
BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3
_FORMAT = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a BEiT-3; the defaults are base at 224 pixels.

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
        """Attend: (B, L, W) → (B, L, W); `seen` (B, 1, 1, L) is False where a key is padding."""
        q, k, v = (
            part[way](tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out_proj[way](self.inner_attn_ln[way](mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with GELU and a LayerNorm between them."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.ffn_layernorm = nn.LayerNorm(mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token: (B, L, W) → (B, L, W)."""
        return self.fc2(self.ffn_layernorm(nn.functional.gelu(self.fc1(tokens))))


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
    """Both branches below their heads."""

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
        """Embed normalised (B, 3, S, S) → (B, W) of any length."""
        tokens = self.beit3.vision_embed(values)
        return self.vision_head(self.beit3.encoder(tokens, IMAGE))

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed token ids and their mask (B, L), 0 where padded, → (B, W) of any length."""
        tokens = self.beit3.text_embed(ids)
        return self.language_head(self.beit3.encoder(tokens, TEXT, mask.bool()[:, None, None]))

    def parameters_by_part(self) -> dict[str, int]:
        """Count the parameters of either side, and of both."""
        counts = {"image": 0, "text": 0}
        for name, value in self.named_parameters():
            words = set(name.split("."))
            if words & {IMAGE, "vision_embed", "vision_head"}:
                counts["image"] += value.numel()
            elif words & {TEXT, "text_embed", "language_head"}:
                counts["text"] += value.numel()
        return {**counts, "total": sum(p.numel() for p in self.parameters())}


class Tokens(NamedTuple):
    """A padded batch of texts."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64, 0 where padded


class Tokenizer:
    """A SentencePiece model whose ids are those that the checkpoints count by.

    Args:
        data: the bytes of a SentencePiece model (`beit3.spm`).
        origin: where they came from, for messages.
        words: rows of the model's word table.
        length: ids of a text, <s> and </s> included; the rest is cut off.

    Raises:
        ConfigError: sentencepiece is not installed.
        ModelError: it is no SentencePiece model, or another model's.
    """

    def __init__(self, data: bytes, origin: str, words: int, length: int) -> None:
        library = extras.load("BEiT-3's tokenizer", "beit3", "sentencepiece")
        self.data, self.length = data, length
        self._pieces = library.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError:
            raise ModelError(
                f"{origin}: not a SentencePiece model; give the beit3.spm that the checkpoints "
                "come with"
            ) from None
        count, unknown = self._pieces.get_piece_size(), self._pieces.unk_id()
        if unknown != 0 or count + 1 > words:
            raise ModelError(
                f"{origin}: {count} pieces with the unknown one at {unknown}, where the checkpoint "
                f"has {words} words and counts it as 0; give its own beit3.spm"
            )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenize B texts → ids and mask (B, L), as long as the longest; "" is <s> </s>."""
        rows = [[BOS, *row[: self.length - 2], EOS] for row in self._encode(texts)]
        longest = max(map(len, rows), default=0)
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return Tokens(ids, mask)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are cut."""
        return sum(len(row) + 2 > self.length for row in self._encode(texts))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = self._pieces.encode([encodable(text) for text in texts])
        return [[piece + 1 if piece else UNKNOWN for piece in row] for row in pieces]


class Beit3(TwoTowers):
    """A frozen BEiT-3; see `Teacher` for what it offers.

    Args:
        network: the model, in float32.
        pieces: the bytes of its SentencePiece model.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.
        origin: where the pieces came from, for messages.

    Raises:
        ConfigError: sentencepiece is not installed.
        ModelError: the pieces are no SentencePiece model, or another model's.
    """

    family = "beit3"

    def __init__(
        self,
        network: Network,
        pieces: bytes,
        name: str,
        device: torch.device | None = None,
        origin: str = PIECES,
    ) -> None:
        shape = network.shape
        self.name, self.dim = name, shape.width
        self.source: str | None = None
        self.licence: str | None = None
        self.max_length = min(LENGTH, shape.places - 2)
        self.tokenizer = Tokenizer(pieces, origin, shape.words, self.max_length)
        self.preprocess = Preprocess(size=(shape.image_size, shape.image_size))
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.requires_grad_(False).to(self.device).eval()

    def _identify(self) -> dict[str, str]:
        pieces = hashlib.sha256(self.tokenizer.data).hexdigest()
        return {
            "weights": tensors_digest(self.network.state_dict()),
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json({"pieces": pieces, "length": self.max_length}),
            "activation": "gelu",
            "family": self.family,
        }

    def parameter_count(self) -> int:
        return self.network.parameters_by_part()["total"]

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the model can read."""
        return self.tokenizer.count_truncated(texts)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.network.embed_image(normalise(pixels, self.preprocess))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        ids, mask = self.tokenizer(texts)
        return self.network.embed_text(ids.to(self.device), mask.to(self.device))

    def save(self, folder: Path) -> None:
        """Write the folder; its record comes last: a folder with one is complete.

        Raises:
            InputError: the folder cannot be written to.
        """
        files.writable_folder(folder)
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        size = sum(value.nbytes for value in state.values())
        files.write_atomic(folder / hub.WEIGHTS, lambda path: save_file(state, path), size)
        files.write_bytes(folder / PIECES, self.tokenizer.data)
        record = {
            "format": _FORMAT,
            "name": self.name,
            "shape": self.network.shape.to_json(),
            "files": artefacts.digests(folder, [hub.WEIGHTS, PIECES]),
        }
        files.write_json(folder / RECORD, files.sealed(record))


def holds(folder: Path) -> bool:
    """Tell whether a folder is one that `Beit3.save` wrote."""
    return (folder / RECORD).is_file()


def load(folder: Path, name: str = "", device: torch.device | None = None) -> Beit3:
    """Read what `Beit3.save` wrote; the licence is that of a README.md beside it.

    Args:
        folder: one that `holds` a BEiT-3.
        name: not used: the folder knows the model's own.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        CorruptError: one of its files was damaged; it is named.
    """
    record = artefacts.read(folder / RECORD, hub.Saved, {_FORMAT}).model_dump()
    artefacts.check_files(folder, {hub.WEIGHTS: "", PIECES: "", **record["files"]})
    with torch.device("meta"):
        network = Network(Shape(**record["shape"]))
    with hub.fitting(folder, "model"):
        network.load_state_dict(load_file(folder / hub.WEIGHTS), assign=True)
    pieces = (folder / PIECES).read_bytes()
    model = Beit3(network, pieces, record["name"], device, str(folder / PIECES))
    model.source, model.licence = str(folder.absolute()), read_licence(folder)
    return model
