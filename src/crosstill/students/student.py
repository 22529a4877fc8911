"""The student: an image tower and a text tower with a linear head each into one joint space."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedTokenizerFast

from crosstill import artefacts, files
from crosstill.errors import ConfigError
from crosstill.formats import encodable
from crosstill.images import Preprocess, normalise
from crosstill.students import student_config
from crosstill.teachers import base
from crosstill.towers import folding, hub, tower_parts
from crosstill.towers.vocabulary import plain
from crosstill.types import Features

# Some Hugging Face towers carry TensorFlow's 0.9997, which in torch forgets all but the last batch.
_MOMENTUM = 0.1
RECORD = "student.json"
# captions of similar length that share a pass on a CPU; with dropout fewer, since the masks of runs
# that were begun before depend on it
CHUNK, CHUNK_WITH_DROPOUT = 32, 16


class Tokens(NamedTuple):
    """A padded batch of captions."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64, 0 where padded


class Student(nn.Module):
    """A small dual encoder; as a `Teacher` it can be evaluated, cached and distilled further.

    Args:
        config: what it is made of; its `dim` is set.
        image: the image tower and its preprocess.
        text: the text tower and its tokenizer.

    Attributes:
        config: as given.
        source: the folder that it was loaded from, if any.
        preprocess: how it wants its images.
        tokenizer: already set to truncate at `config.max_length`.
        licences: of the pretrained towers, by "image" and "text".
        axes: (D, D), columns, of a student with several widths: see `shorten`.
        drops: whether the towers' dropout is on while they learn.
    """

    kind: ClassVar[base.Kind] = "encoder"
    modalities = frozenset({"image", "text"})
    axes: Tensor

    def __init__(
        self,
        config: student_config.StudentConfig,
        image: tower_parts.ImagePart,
        text: tower_parts.TextPart,
    ) -> None:
        super().__init__()
        if config.dim is None:
            raise ValueError("a student is built with a dim")
        self.config = config
        self.image_tower, self.text_tower = image.tower, text.tower
        self.preprocess: Preprocess = image.preprocess
        self.tokenizer: PreTrainedTokenizerFast = text.tokenizer
        self.tokenizer.backend_tokenizer.enable_truncation(config.max_length)
        self.source: str | None = None
        self.drops = True
        self.licences = {"image": image.licence, "text": text.licence}
        if config.widths:
            self.register_buffer("axes", torch.eye(config.dim))
        self._norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        self.image_head = nn.Linear(self._image_width(), config.dim, config.bias)
        self.text_head = nn.Linear(self._text_width(), config.dim, config.bias)
        for head in (self.image_head, self.text_head):
            nn.init.xavier_normal_(head.weight, gain=2**0.5)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        for norm in self._norms:
            if norm.momentum is not None and norm.momentum > 0.5:
                norm.momentum = _MOMENTUM
        if config.freezes_batch_norm:
            self.eval()
            folding.fold_norms(self.image_tower, self._pool_blank)
        self.train()

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def dim(self) -> int:
        return self.image_head.out_features

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that it learns, in ascending order; the last is `dim`."""
        return tuple(sorted({*self.config.widths, self.dim}))

    @property
    def licence(self) -> str | None:
        return " and ".join(sorted({word for word in self.licences.values() if word})) or None

    @property
    def device(self) -> torch.device:
        return self.image_head.weight.device

    def train(self, mode: bool = True) -> Self:
        """As in torch, but frozen batch norms keep their statistics, and dropout may stay off."""
        super().train(mode and self.drops)
        self.training = mode
        for norm in self._norms:
            norm.train(mode and not self.config.freezes_batch_norm)
        return self

    def forward(self, images: Tensor, texts: Tokens | Tensor, normalise: bool = True) -> Features:
        """Run both towers: rows (B, D) of each.

        Args:
            images: uint8 pixels (B, 3, H, W), or (B, W) pooled before, for a frozen tower.
            texts: tokens of (B, L), or (B, W) pooled before.
            normalise: unit rows; else as the heads give them.
        """
        image = images if images.ndim == 2 else self.pool_image(images)
        text = texts if isinstance(texts, Tensor) else self._pool_by_length(texts)
        if not normalise:
            return Features(self.image_head(image), self.text_head(text))
        return Features(self.embed_image(image), self.embed_text(text))

    def pool_image(self, pixels: Tensor) -> Tensor:
        """Pool pixels (B, 3, H, W), uint8 or normalised floats, → the tower's own rows (B, W)."""
        values = normalise(pixels, self.preprocess) if pixels.dtype == torch.uint8 else pixels
        values = values.contiguous(memory_format=torch.channels_last)
        return tower_parts.pool(self.image_tower(pixel_values=values), self.config.image.pooling)

    def pool_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool tokens (B, L) → the tower's own rows (B, W)."""
        output = self.text_tower(input_ids=input_ids, attention_mask=attention_mask)
        return tower_parts.pool(output, self.config.text.pooling, attention_mask)

    def _pool_by_length(self, texts: Tokens) -> Tensor:
        """`pool_text` in chunks of similar length: on a CPU padding is work (1.5 x measured)."""
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return self.pool_text(*texts)
        lengths = texts.attention_mask.sum(1).tolist()

        def pool_rows(rows: list[int]) -> Tensor:
            return self.pool_text(*(part[rows, : lengths[rows[-1]]] for part in texts))

        size = CHUNK_WITH_DROPOUT if self.drops else CHUNK
        return base.encode_by_length(lengths, pool_rows, size)

    def embed_image(self, pooled: Tensor) -> Tensor:
        """Project pooled (B, W) → unit rows (B, D)."""
        return nn.functional.normalize(self.image_head(pooled), dim=-1)

    def embed_text(self, pooled: Tensor) -> Tensor:
        """Project pooled (B, W) → unit rows (B, D)."""
        return nn.functional.normalize(self.text_head(pooled), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed pixels (B, 3, H, W) → unit rows (B, D)."""
        return self.embed_image(self.pool_image(pixels))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Embed tokens (B, L) → unit rows (B, D)."""
        return self.embed_text(self.pool_text(*tokens))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, special ones included, at most `max_length`."""
        return [encoding.ids for encoding in self._encodings(texts)]

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are cut at `max_length`."""
        return sum(bool(encoding.overflowing) for encoding in self._encodings(texts))

    def pad(self, ids: Sequence[Sequence[int]]) -> Tokens:
        """Pad the token ids of B texts → (B, L) with L that of the longest."""
        rows = [torch.tensor(row, dtype=torch.int64) for row in ids]
        masks = [torch.ones_like(row) for row in rows]
        padding = float(self.tokenizer.pad_token_id or 0)
        return Tokens(
            nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding),
            nn.utils.rnn.pad_sequence(masks, batch_first=True),
        )

    def embed_images(self, pixels: Tensor) -> Tensor:
        """As `Teacher.embed_images`; the training mode is as before afterwards."""
        if not len(pixels):
            return torch.empty(0, self.dim)
        with base.evaluating(self):
            return base.unit(base.embed_pixels(pixels, self.encode_image, self.device), self.name)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """As `Teacher.embed_texts`; the training mode is as before afterwards."""
        if not texts:
            return torch.empty(0, self.dim)
        with base.evaluating(self):
            return base.unit(
                base.embed_by_length(texts, lambda some: self.encode_text(self._tokens(some))),
                self.name,
            )

    def raw_images(self, pixels: Tensor) -> Tensor:
        """As `RawTeacher.raw_images`; the training mode is as before afterwards."""
        if not len(pixels):
            return torch.empty(0, self.dim)

        def encode(chunk: Tensor) -> Tensor:
            return self.image_head(self.pool_image(chunk))

        with base.evaluating(self):
            return base.directed(base.embed_pixels(pixels, encode, self.device), self.name)

    def raw_texts(self, texts: Sequence[str]) -> Tensor:
        """As `RawTeacher.raw_texts`; the training mode is as before afterwards."""
        if not texts:
            return torch.empty(0, self.dim)

        def encode(some: list[str]) -> Tensor:
            return self.text_head(self.pool_text(*self._tokens(some)))

        with base.evaluating(self):
            return base.directed(base.embed_by_length(texts, encode), self.name)

    def identity(self) -> dict[str, str]:
        """As `Teacher.identity`; computed anew each time, since training changes the weights."""
        parts = (self.image_tower.config, self.text_tower.config)
        return {
            "weights": base.tensors_digest(self.state_dict()),
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json(self.tokenizer.backend_tokenizer.to_str()),
            "activation": "/".join(str(getattr(part, "hidden_act", "none")) for part in parts),
            "family": "crosstill-student",
        }

    def tower_digest(self, side: str) -> str:
        """Return the SHA-256 of what decides the rows of `pool_image` or `pool_text`."""
        config = getattr(self.config, side)
        reads = self.preprocess.digest() if side == "image" else self.identity()["tokenizer"]
        weights = base.tensors_digest(getattr(self, f"{side}_tower").state_dict())
        return files.digest_json([weights, config.pooling, reads])

    def save(self, folder: Path) -> None:
        """Write all that `load` needs: weights, configuration, tokenizer, their checksums.

        Raises:
            InputError: the folder cannot be written to.
        """
        record = {
            "config": self._inlined().model_dump(),
            "preprocess": self.preprocess.to_json(),
            "licences": self.licences,
        }
        hub.save(folder, RECORD, record, self.state_dict(), self.tokenizer)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, bit for bit, in eval mode; the towers' sources are not needed.

        Raises:
            ModelError: the folder holds no student.
            CorruptError: one of its files was damaged; it is named.
        """
        record, weights, tokenizer = hub.read_saved(folder, RECORD)
        with artefacts.readable(folder / RECORD):
            student = cls._assembled(folder, record, tokenizer)
        with hub.fitting(folder, "student"):
            student.load_state_dict(weights)
        student.source = str(folder.absolute())
        return student.eval()

    @classmethod
    def _assembled(
        cls, folder: Path, record: dict[str, Any], tokenizer: PreTrainedTokenizerFast
    ) -> Self:
        """Build a student from its record, with random weights."""
        config = student_config.parse(record["config"], str(folder / RECORD))
        preprocess, licences = Preprocess.from_json(record["preprocess"]), record["licences"]
        image, text = (
            tower_parts.assemble(tower_parts.restore(part.config or {}), part.pooling)
            for part in (config.image, config.text)
        )
        if config.text.narrow is not None:
            tower_parts.put_factored(text, config.text.narrow)
        with torch.random.fork_rng():
            return cls(
                config,
                tower_parts.ImagePart(image, preprocess, licences["image"]),
                tower_parts.TextPart(text, plain(tokenizer), licences["text"]),
            )

    def fusion_layers(self) -> list[nn.Parameter]:
        """Return nothing: a dual encoder has no layers that read image and text together."""
        return []

    def parameters_by_part(self) -> dict[str, int]:
        """Count the parameters of each part; "text tower" includes "text embeddings"."""
        counts = {
            "image tower": _count(self.image_tower),
            "text tower": _count(self.text_tower),
            "text embeddings": _count(tower_parts.token_embeddings(self.text_tower)),
            "heads": _count(self.image_head) + _count(self.text_head),
        }
        return {**counts, "total": _count(self)}

    def parameter_count(self) -> int:
        """Count its parameters."""
        return _count(self)

    def _inlined(self) -> student_config.StudentConfig:
        """Return the configuration with the towers' own in place of their sources."""
        image, text = self.config.image, self.config.text
        described = [tower_parts.describe(t.config) for t in (self.image_tower, self.text_tower)]
        return self.config.model_copy(
            update={
                "image": student_config.ImageTowerConfig(
                    config=described[0], pooling=image.pooling, pretrained=image.is_pretrained
                ),
                "text": student_config.TextTowerConfig(
                    config=described[1],
                    pooling=text.pooling,
                    narrow=text.narrow,
                    pretrained=text.is_pretrained,
                ),
                "batch_norm": "frozen" if self.config.freezes_batch_norm else "train",
            }
        )

    def _image_width(self) -> int:
        """Measure the width of the image tower's rows; refuse photos that it does not take."""
        size = self.preprocess.size
        with base.evaluating(self):
            try:
                return self._pool_blank().shape[1]
            except (RuntimeError, ValueError) as error:
                kind, line = type(self.image_tower).__name__, " ".join(str(error).split())[:120]
                raise ConfigError(f"photos of {size} pixels do not fit {kind} ({line})") from None

    def _pool_blank(self) -> Tensor:
        return self.pool_image(torch.zeros(1, 3, *self.preprocess.size))

    def _text_width(self) -> int:
        """Measure the width of the text tower's rows; refuse a `max_length` that is too long."""
        ids, most = self.tokenize(["a"])[0], self.config.max_length
        with base.evaluating(self):
            width = self.pool_text(*self.pad([ids])).shape[1]
            try:
                self.pool_text(*self.pad([(ids * most)[:most]]))
            except (IndexError, RuntimeError, ValueError):
                kind = type(self.text_tower).__name__
                raise ConfigError(
                    f"max_length = {most}: this {kind} has fewer positions; give less"
                ) from None
        return width

    def _encodings(self, texts: Sequence[str]) -> Any:
        return self.tokenizer.backend_tokenizer.encode_batch([encodable(text) for text in texts])

    def _tokens(self, texts: list[str]) -> Tokens:
        return Tokens(*(part.to(self.device) for part in self.pad(self.tokenize(texts))))


def _count(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
