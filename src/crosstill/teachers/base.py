"""Protocols of models and teachers, and the small steps that all teachers share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from crosstill import progress
from crosstill.errors import ModelError
from crosstill.formats import by_length
from crosstill.images import Preprocess

# Measured on 2 CPU cores with MobileNetV2 at 224 x 224: eight images at a time keep a layer's
# activations in the cache and run 2.5 times as fast as 64; other sizes get as many pixels.
_CPU_PIXELS = 8 * 224 * 224
_GPU_PIXELS = 256 * 224 * 224
TEXTS = 64
_BLOCK = 4096  # texts tokenized at a time where they are only counted


Kind = Literal["encoder", "matcher", "vectors"]


class Model(Protocol):
    """A model that `crosstill.open_model` opened.

    Attributes:
        kind: "encoder" embeds images and texts one by one, "matcher" scores an image and a text
            together, "vectors" only looks up what was embedded elsewhere.
        name: what to call it in tables.
        preprocess: how it wants its images; None for vectors.
    """

    @property
    def kind(self) -> Kind: ...

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str | None: ...

    @property
    def licence(self) -> str | None: ...

    @property
    def preprocess(self) -> Any: ...

    def identity(self) -> dict[str, str]:
        """Return the hashes that identify this model."""
        ...


class PairModel(Model, Protocol):
    """A model that reads an image and a text together and scores how well the two match."""

    def score(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Score image i with text i: uint8 pixels and texts of P pairs → (P,) logits."""
        ...


def kind_of(model: object) -> Kind:
    """Return a model's kind; one from elsewhere need not say it, and then scores or embeds."""
    kind: Kind = getattr(model, "kind", "matcher" if hasattr(model, "score") else "encoder")
    return kind


@runtime_checkable
class Teacher(Protocol):
    """A frozen model that turns images, texts or both into unit-norm rows of one space.

    Attributes:
        name: what to call it in tables.
        dim: D, the width of its embeddings.
        licence: as its model card says, or None where it says nothing.
        preprocess: how it wants its images.
        source: the folder that it was read from, or None for a model made in memory.
        modalities: which of "image" and "text" it can embed.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str | None: ...

    @property
    def dim(self) -> int: ...

    @property
    def licence(self) -> str | None: ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def modalities(self) -> frozenset[str]: ...

    def identity(self) -> dict[str, str]:
        """Return the hashes that identify this model: its weights, its inputs, its family."""
        ...

    def parameter_count(self) -> int:
        """Count its parameters."""
        ...

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed uint8 (B, 3, H, W), sized by `preprocess` → float32 unit rows (B, D) on the CPU."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts → float32 unit rows (B, D) on the CPU."""
        ...

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than it can read."""
        ...


@runtime_checkable
class RawTeacher(Protocol):
    """A `Teacher` that also gives its rows before their L2 normalisation."""

    def raw_images(self, pixels: Tensor) -> Tensor:
        """Embed uint8 (B, 3, H, W), sized by `preprocess` → float32 (B, D) of any length."""
        ...

    def raw_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts → float32 (B, D) of any length."""
        ...


class TwoTowers(ABC):
    """Base of frozen dual encoders, whatever library their towers come from.

    Attributes:
        name: what to call it in tables.
        dim: D, the width of its embeddings.
        device: where it computes.
    """

    kind: ClassVar[Kind] = "encoder"
    modalities = frozenset({"image", "text"})
    name: str
    dim: int
    device: torch.device

    @abstractmethod
    def _identify(self) -> dict[str, str]:
        """Return the hashes that identify this model; called once."""

    @abstractmethod
    def _encode_images(self, pixels: Tensor) -> Tensor:
        """Encode uint8 (B, 3, H, W) on the device → (B, D) of any length."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Encode B texts → (B, D) of any length."""

    @cached_property
    def _identity(self) -> dict[str, str]:
        return self._identify()

    def identity(self) -> dict[str, str]:
        """As `Teacher.identity`."""
        return dict(self._identity)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """As `Teacher.embed_images`."""
        return nn.functional.normalize(self.raw_images(pixels), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """As `Teacher.embed_texts`."""
        return nn.functional.normalize(self.raw_texts(texts), dim=-1)

    @torch.inference_mode()
    def raw_images(self, pixels: Tensor) -> Tensor:
        """As `RawTeacher.raw_images`."""
        if not len(pixels):
            return torch.empty(0, self.dim)
        return directed(embed_pixels(pixels, self._encode_images, self.device), self.name)

    @torch.inference_mode()
    def raw_texts(self, texts: Sequence[str]) -> Tensor:
        """As `RawTeacher.raw_texts`."""
        if not texts:
            return torch.empty(0, self.dim)
        return directed(embed_by_length(texts, self._encode_texts), self.name)


def unit(rows: Tensor, owner: str) -> Tensor:
    """Scale rows to length 1, in float32 on the CPU: (B, D) → (B, D).

    Raises:
        ModelError: as `directed`.
    """
    return nn.functional.normalize(directed(rows, owner), dim=-1)


def directed(rows: Tensor, owner: str) -> Tensor:
    """Return rows in float32 on the CPU, once each is known to have a direction: (B, D) → (B, D).

    Raises:
        ModelError: a row is NaN, infinite or zero, so it has no direction.
    """
    rows = rows.float().cpu()
    lengths = rows.norm(dim=-1)
    bad = int((~lengths.isfinite() | (lengths == 0)).sum())
    if bad:
        raise ModelError(
            f"{owner}: {bad} of {len(rows)} embeddings are NaN, infinite or zero; check its weights"
        )
    return rows


def embed_pixels(
    pixels: Tensor, encode: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Encode uint8 (B, 3, H, W) in chunks of the size that is quickest on the device → (B, D)."""
    budget = _CPU_PIXELS if device.type == "cpu" else _GPU_PIXELS
    size = max(1, budget // max(1, pixels.shape[-2] * pixels.shape[-1]))
    return torch.cat([encode(chunk.to(device)) for chunk in pixels.split(size)])


def encode_by_length(
    lengths: Iterable[int], encode: Callable[[list[int]], Tensor], size: int
) -> Tensor:
    """Encode rows of similar length together → (B, D), in the order of the rows.

    Args:
        lengths: (B,) of every row, in characters or tokens.
        encode: gives (b, D) of the rows of these numbers.
        size: the largest b.
    """
    chunks = by_length(lengths, size)
    rows = torch.cat([encode(chunk) for chunk in chunks])
    return rows[torch.tensor([row for chunk in chunks for row in chunk]).argsort()]


def embed_by_length(
    texts: Sequence[str],
    encode: Callable[[list[str]], Tensor],
    size: int = TEXTS,
    bar: progress.Bar | None = None,
) -> Tensor:
    """Encode B texts, `size` of similar length at a time → (B, D)."""

    def encode_rows(rows: list[int]) -> Tensor:
        encoded = encode([texts[row] for row in rows])
        if bar is not None:
            bar.advance(len(rows))
        return encoded

    return encode_by_length(map(len, texts), encode_rows, size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, while the block runs."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


class TextReader(Protocol):
    """A model that reads texts up to a length, whatever it makes of them."""

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than it can read."""
        ...


def count_truncated(model: TextReader, texts: Sequence[str]) -> int:
    """Count the texts that a model cuts, some thousands at a time: tokens of millions are large."""
    starts = range(0, len(texts), _BLOCK)
    return sum(model.count_truncated(texts[at : at + _BLOCK]) for at in starts)


def truncation_note(models: Mapping[str, TextReader], texts: Sequence[str]) -> str:
    """Write in one line how many of the texts each model cuts; "" where none cuts any.

    Args:
        models: by the name that the line gives them.
        texts: captions.
    """
    counts = {name: count_truncated(model, texts) for name, model in models.items()}
    parts = [f"{name} {count:,} of {len(texts):,}" for name, count in counts.items() if count]
    return f"captions longer than a model reads, cut: {', '.join(parts)}" if parts else ""


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, shapes, types and values."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
