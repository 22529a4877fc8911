"""Fusion models: they read an image and a text together and score how well the two match.

A fusion model cannot search: N images and M texts are N x M passes. What it computes of either side
alone is computed once, by the towers (`encode_images`, `encode_texts`) and by what the fusion part
does before the two meet (`project`). Every pair then costs one pass of `score_states`.
"""

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from crosstill import files
from crosstill.errors import ConfigError, ModelError
from crosstill.formats import by_length, encodable
from crosstill.images import Preprocess
from crosstill.teachers.base import Kind, embed_pixels, evaluating, tensors_digest
from crosstill.types import States

PAIRS = 64  # pairs in one pass on a CPU; more only spill its cache
GPU_PAIRS = 1024


@runtime_checkable
class FusionTeacher(Protocol):
    """A model that scores pairs; score caches take any object with these members."""

    name: str
    preprocess: Preprocess

    def score(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Score image i with text i: pixels and texts of P pairs → (P,) logits."""
        ...


class Matcher(nn.Module, ABC):
    """Base of all fusion models, teachers and students alike.

    A family writes `encode_images`, `encode_texts` and `score_states`, and `project` if something
    is learnt between towers and fusion. It names the parts that are towers, and counts its fusion
    layers.

    Attributes:
        family: "vilt", "blip", "bridgetower" or "meter".
        head: what the names of the scoring head's parameters contain.
        name: what to call it in tables.
        source: the folder that it was read from, or None for a model made in memory.
        licence: as its model card says, or None where it says nothing.
        preprocess: how it wants its images.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens of a text, special ones included; the rest is cut off.
        drops: whether its dropout is on while it learns.
    """

    kind: ClassVar[Kind] = "matcher"
    head: ClassVar[str] = "rank_output"
    family: str
    name: str
    source: str | None
    licence: str | None
    preprocess: Preprocess
    tokenizer: Any
    max_length: int
    drops: bool = True

    # --- what a family writes ---

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> States:
        """Run the image tower: uint8 (B, 3, H, W), resized by `preprocess`, → states."""

    @abstractmethod
    def encode_texts(self, tokens: States) -> States:
        """Run the text tower: token ids (B, L) and their mask → states."""

    def project(self, states: States, side: str) -> States:
        """Take one side's states ("image" or "text") into the fusion part, before the two meet."""
        return states

    @abstractmethod
    def score_states(self, images: States, texts: States) -> Tensor:
        """Score image i with text i: projected states of P pairs each → (P,) logits.

        The logit is that of "they belong together"; higher is better.
        """

    @abstractmethod
    def towers(self) -> list[nn.Module]:
        """Return the parts that encode one side alone; they stay frozen in distillation."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Count the fusion layers."""

    @abstractmethod
    def keep_layers(self, layers: Sequence[int]) -> None:
        """Drop all fusion layers but these, in this order; called by `cut`, which checks them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that `crosstill.open_model` opens."""

    # --- what all share ---

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> States:
        """Return token ids (B, L) as `hidden`, L that of the longest of the texts."""
        tokens = self.tokenizer(
            [encodable(text) for text in texts],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return States(tokens["input_ids"], tokens["attention_mask"])

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than it can read."""
        plain = [encodable(text) for text in texts]
        ids = self.tokenizer(plain, truncation=False, verbose=False)["input_ids"] if plain else []
        return sum(len(row) > self.max_length for row in ids)

    @torch.inference_mode()
    def image_states(self, pixels: Sequence[Tensor]) -> States:
        """Encode and project uint8 (3, H, W) images, which may differ in size in some families."""
        with evaluating(self):
            return self.project(self.encode_mixed(pixels), "image")

    @torch.inference_mode()
    def text_states(self, texts: Sequence[str]) -> States:
        """Encode and project texts."""
        with evaluating(self):
            tokens = self.tokenize(texts)
            return self.project(
                self.encode_texts(States(*(t.to(self.device) for t in tokens))), "text"
            )

    def encode_mixed(self, pixels: Sequence[Tensor]) -> States:
        """Encode images of any mix of sizes, in chunks that suit the device."""
        shapes = sorted({tuple(image.shape) for image in pixels})
        parts: list[States] = []
        order: list[int] = []
        for shape in shapes:
            rows = [row for row, image in enumerate(pixels) if tuple(image.shape) == shape]
            stack = torch.stack([pixels[row] for row in rows])
            hidden = embed_pixels(
                stack, lambda chunk: self.encode_images(chunk).hidden, self.device
            )
            parts.append(States(hidden, torch.ones(hidden.shape[:2], dtype=torch.int64)))
            order += rows
        whole = joined(parts)
        back = torch.tensor(order).argsort()
        return States(whole.hidden[back.to(self.device)], whole.mask[back].to(self.device))

    @torch.inference_mode()
    def score_pairs(self, images: States, texts: States, pairs: Tensor) -> Tensor:
        """Score pairs, in chunks: (P, 2) rows of `images` and of `texts` → (P,) on the CPU.

        Raises:
            ModelError: a score is NaN or infinite.
        """
        size = PAIRS if self.device.type == "cpu" else GPU_PAIRS
        # texts of one length share a pass, so that little is padding
        lengths = texts.mask.sum(1).cpu()[pairs[:, 1]].tolist()
        out = torch.empty(len(pairs))
        with evaluating(self):
            for chunk in by_length(lengths, size):
                image, text = pairs[chunk].unbind(1)
                out[chunk] = self.score_states(images.take(image), texts.take(text)).float().cpu()
        if not out.isfinite().all():
            raise ModelError(f"{self.name}: its scores are not finite; check its weights")
        return out

    def score(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """As `FusionTeacher.score`: image i with text i → (P,) on the CPU."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts are no pairs")
        rows = torch.arange(len(texts))
        both = torch.stack([rows, rows], dim=1)
        return self.score_pairs(self.image_states(images), self.text_states(texts), both)

    def identity(self) -> dict[str, str]:
        """Return the hashes that identify this model: its weights, its inputs, its family."""
        return {
            "weights": tensors_digest(self.state_dict()),
            **self._inputs(),
            "activation": self.activation,
            "family": self.family,
        }

    def _inputs(self) -> dict[str, str]:
        rules = rules_without_padding(self.tokenizer.backend_tokenizer.to_str())
        return {
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json([rules, self.max_length]),
        }

    def towers_digest(self) -> str:
        """Return the SHA-256 of what decides the output of `encode_images` and `encode_texts`."""
        parts = [tensors_digest(tower.state_dict()) for tower in self.towers()]
        return files.digest_json([parts, self._inputs(), self.family])

    @property
    def activation(self) -> str:
        """Name the non-linearities that the weights were trained with."""
        return "gelu"

    def parameter_count(self) -> int:
        """Count its parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters_by_part(self) -> dict[str, int]:
        """Count the parameters of the towers, of the fusion part, and of both."""
        towers = sum(p.numel() for tower in self.towers() for p in tower.parameters())
        total = self.parameter_count()
        return {"towers": towers, "fusion": total - towers, "total": total}

    def fusion_layers(self) -> list[nn.Parameter]:
        """List the parameters of all but towers and scoring head."""
        towers = {id(p) for tower in self.towers() for p in tower.parameters()}
        named = self.named_parameters()
        return [p for name, p in named if id(p) not in towers and self.head not in name]

    def freeze_towers(self) -> Self:
        """Stop the towers from learning."""
        for tower in self.towers():
            tower.requires_grad_(False)
        return self

    @property
    def towers_frozen(self) -> bool:
        """Whether the towers no longer learn, so that their states can be kept."""
        return not any(p.requires_grad for tower in self.towers() for p in tower.parameters())

    def train(self, mode: bool = True) -> Self:
        """As in torch, but frozen towers stay in evaluation mode, and dropout may stay off."""
        super().train(mode and self.drops)
        self.training = mode
        for tower in self.towers():
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def cut(self, layers: Sequence[int] | None = None) -> Self:
        """Copy the model with fewer fusion layers: DCD's student (arXiv 2207.01426).

        Args:
            layers: which to keep, in order; None keeps half of them, see `half`.

        Raises:
            ConfigError: a layer that is not there, none, or one that is named twice.
        """
        chosen = half(self.depth) if layers is None else list(layers)
        wrong = [layer for layer in chosen if not 0 <= layer < self.depth]
        if wrong or not chosen or len(set(chosen)) != len(chosen):
            raise ConfigError(
                f"layers = {chosen}: {self.name} has fusion layers 0 to {self.depth - 1}; "
                "name some of them, each once"
            )
        student = copy.deepcopy(self)
        student.keep_layers(chosen)
        student.source = None
        return student


class Reader:
    """Projected states of many texts, each computed once while they fit into memory.

    The last bits of a text's states depend on the texts that share its pass, and so on the calls
    before. To go on with work that was stopped, repeat its calls with `keep`.

    Args:
        model: the fusion model.
        texts: all texts.
        room: bytes of states to keep, those of the first texts that are asked for; what does not
            fit is read again when it is asked for.
        size: texts in one pass of the model.
    """

    def __init__(
        self, model: Matcher, texts: Sequence[str], room: int = 2**31, size: int = PAIRS
    ) -> None:
        self.model, self._texts, self._room, self._size = model, texts, room, size
        self._kept: dict[int, Tensor] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the states that a call of `states` would keep, without computing more."""
        for part in self._passes(rows):
            if self._room <= 0:
                return
            self._read(part)

    def states(self, rows: Sequence[int]) -> States:
        """Return projected states of some of the texts, padded to the longest of them."""
        fresh = [self._read(part) for part in self._passes(rows)]
        available = {
            **self._kept,
            **{row: states for part in fresh for row, states in part.items()},
        }
        hidden = nn.utils.rnn.pad_sequence([available[row] for row in rows], batch_first=True)
        lengths = torch.tensor([len(available[row]) for row in rows], device=hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return States(hidden, mask.long())

    def _passes(self, rows: Sequence[int]) -> list[list[int]]:
        """Split the rows that are not kept into passes of texts of similar length."""
        new = [row for row in rows if row not in self._kept]
        chunks = by_length((len(self._texts[row]) for row in new), self._size)
        return [[new[place] for place in chunk] for chunk in chunks]

    def _read(self, rows: list[int]) -> dict[int, Tensor]:
        hidden, mask = self.model.text_states([self._texts[row] for row in rows])
        lengths = mask.sum(1).tolist()
        parts = zip(rows, hidden, lengths, strict=True)
        by_row = {row: states[:length].clone() for row, states, length in parts}
        size = sum(states.nbytes for states in by_row.values())
        self._room -= size
        if self._room >= 0:
            self._kept |= by_row
        return by_row


def score_pairs(
    teacher: FusionTeacher, images: Sequence[Tensor], texts: Sequence[str], pairs: Tensor
) -> Tensor:
    """Score (P, 2) rows of `images` and of `texts` → (P,), by a teacher of any kind."""
    out = [
        teacher.score([images[i] for i, _ in chunk], [texts[t] for _, t in chunk])
        for chunk in (rows.tolist() for rows in pairs.split(PAIRS))
    ]
    return torch.cat(out)


def half(depth: int) -> list[int]:
    """List every other layer, the first and last among them: 6 → 0, 3, 5 as DCD's authors do.

    >>> half(6), half(12), half(4), half(3), half(2)
    ([0, 3, 5], [0, 3, 5, 7, 9, 11], [0, 3], [2], [1])
    """
    kept = max(1, depth // 2)
    last = list(range(depth - 1, -1, -2))[:kept][::-1]
    return last if kept == 1 else [0, *last[1:]]


def joined(parts: Iterable[States]) -> States:
    """Join the states of several batches into one, padded to the longest."""
    whole = list(parts)
    longest = max(part.mask.shape[1] for part in whole)
    hidden, mask = (torch.cat([padded(part[side], longest) for part in whole]) for side in range(2))
    return States(hidden, mask)


def padded(values: Tensor, length: int) -> Tensor:
    """Append zeros: (B, L, ...) → (B, length, ...)."""
    short = length - values.shape[1]
    if not short:
        return values
    filler = values.new_zeros(len(values), short, *values.shape[2:])
    return torch.cat([values, filler], dim=1)


def rules_without_padding(rules: str) -> dict[str, Any]:
    """Return a tokenizer's JSON without the padding and truncation of its last call."""
    return {**json.loads(rules), "padding": None, "truncation": None}
