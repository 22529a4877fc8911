"""What a fusion model is: it reads an image and a text together and scores how well they match.

A fusion model cannot search: N images and M texts are N x M passes. What it computes of either
side alone is computed once (`look`, `read`, `enter`) and used in every pair (`match`).
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from crosstill import files
from crosstill.errors import ConfigError, ModelError
from crosstill.formats import by_length, encodable
from crosstill.images import Preprocess
from crosstill.teachers.base import embed_pixels, evaluating, tensors_digest
from crosstill.types import States

PAIRS = 64  # pairs in one pass on a CPU; more only spill its cache
GPU_PAIRS = 1024


@runtime_checkable
class FusionTeacher(Protocol):
    """What a score cache, an evaluation and a re-ranking ask of a fusion model."""

    name: str
    preprocess: Preprocess

    def score(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """How well image i fits text i: pixels and texts of P pairs → (P,) logits."""
        ...


class Matcher(nn.Module, ABC):
    """Base of all fusion models, teachers and students alike.

    A family writes `look`, `read`, `match`, and `enter` if something is learnt between towers
    and fusion; it says which parts are towers, and how many fusion layers it has.

    Attributes:
        family: "vilt", "blip", "bridgetower" or "meter".
        name: what to call it in tables.
        source: the folder that it was read from, or None for a model made in memory.
        licence: as its model card says, or None where it says nothing.
        preprocess: how it wants its images.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens of a text, special ones included; the rest is cut off.
    """

    family: str
    name: str
    source: str | None
    licence: str | None
    preprocess: Preprocess
    tokenizer: Any
    max_length: int

    # --- what a family writes ---

    @abstractmethod
    def look(self, pixels: Tensor) -> States:
        """Towers' states of images: uint8 (B, 3, H, W), resized by `preprocess`."""

    @abstractmethod
    def read(self, tokens: States) -> States:
        """Towers' states of texts, from token ids (B, L) and their mask."""

    def enter(self, states: States, side: str) -> States:
        """What the fusion part does to one side ("image" or "text") before the two meet."""
        return states

    @abstractmethod
    def match(self, images: States, texts: States) -> Tensor:
        """Score image i with text i: entered states of P pairs each → (P,) logits.

        The logit is that of "they belong together"; higher is better.
        """

    @abstractmethod
    def towers(self) -> list[nn.Module]:
        """The parts that `look` and `read` run: what stays frozen in distillation."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many fusion layers there are."""

    @abstractmethod
    def keep_layers(self, layers: Sequence[int]) -> None:
        """Drop all fusion layers but these, in this order; called by `cut`, which checks them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that `teachers.load` reads."""

    # --- what all share ---

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> States:
        """Token ids (B, L) as `hidden`, L that of the longest of the texts."""
        found = self.tokenizer(
            [encodable(text) for text in texts],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return States(found["input_ids"], found["attention_mask"])

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than it can read."""
        plain = [encodable(text) for text in texts]
        ids = self.tokenizer(plain, truncation=False, verbose=False)["input_ids"] if plain else []
        return sum(len(row) > self.max_length for row in ids)

    @torch.inference_mode()
    def image_states(self, pixels: Sequence[Tensor]) -> States:
        """Entered states of uint8 (3, H, W) images, which may differ in size where they may."""
        with evaluating(self):
            return self.enter(self.look_at(pixels), "image")

    @torch.inference_mode()
    def text_states(self, texts: Sequence[str]) -> States:
        """Entered states of texts."""
        with evaluating(self):
            tokens = self.tokenize(texts)
            return self.enter(self.read(States(*(t.to(self.device) for t in tokens))), "text")

    def look_at(self, pixels: Sequence[Tensor]) -> States:
        """`look` at images of any mix of sizes, in chunks that suit the device."""
        shapes = sorted({tuple(image.shape) for image in pixels})
        found: list[States] = []
        order: list[int] = []
        for shape in shapes:
            rows = [row for row, image in enumerate(pixels) if tuple(image.shape) == shape]
            stack = torch.stack([pixels[row] for row in rows])
            hidden = embed_pixels(stack, lambda chunk: self.look(chunk).hidden, self.device)
            found.append(States(hidden, torch.ones(hidden.shape[:2], dtype=torch.int64)))
            order += rows
        whole = joined(found)
        back = torch.tensor(order).argsort()
        return States(whole.hidden[back.to(self.device)], whole.mask[back].to(self.device))

    @torch.inference_mode()
    def match_pairs(self, images: States, texts: States, pairs: Tensor) -> Tensor:
        """Scores of pairs, in chunks: (P, 2) rows of `images` and of `texts` → (P,) on the CPU.

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
                out[chunk] = self.match(images.take(image), texts.take(text)).float().cpu()
        if not out.isfinite().all():
            raise ModelError(f"{self.name}: its scores are not finite; check its weights")
        return out

    def score(self, images: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """As `FusionTeacher.score`: image i with text i → (P,) on the CPU."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts are no pairs")
        rows = torch.arange(len(texts))
        both = torch.stack([rows, rows], dim=1)
        return self.match_pairs(self.image_states(images), self.text_states(texts), both)

    def identity(self) -> dict[str, str]:
        """All that decides its output: weights, preprocess, tokenizer, activation, family."""
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
        """SHA-256 of all that decides what `look` and `read` give."""
        parts = [tensors_digest(tower.state_dict()) for tower in self.towers()]
        return files.digest_json([parts, self._inputs(), self.family])

    @property
    def activation(self) -> str:
        """The non-linearities that the weights were trained with."""
        return "gelu"

    def parameter_count(self) -> int:
        """How many parameters it has in all."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters_by_part(self) -> dict[str, int]:
        """How many parameters the towers have, and the fusion part."""
        towers = sum(p.numel() for tower in self.towers() for p in tower.parameters())
        total = self.parameter_count()
        return {"towers": towers, "fusion": total - towers, "total": total}

    def freeze_towers(self) -> Self:
        """Let nothing of the towers learn."""
        for tower in self.towers():
            tower.requires_grad_(False)
        return self

    @property
    def towers_frozen(self) -> bool:
        """Whether `look` and `read` give the same states for ever."""
        return not any(p.requires_grad for tower in self.towers() for p in tower.parameters())

    def train(self, mode: bool = True) -> Self:
        """As in torch, but frozen towers stay in evaluation mode, without dropout."""
        super().train(mode)
        for tower in self.towers():
            if not any(p.requires_grad for p in tower.parameters()):
                tower.eval()
        return self

    def cut(self, layers: Sequence[int] | None = None) -> Self:
        """A copy with fewer fusion layers, everything else copied: DCD's student (2207.01426).

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
    """Many texts' states, each computed once while they fit into memory.

    The last bits of a text's states depend on the texts that share its pass, and so on what was
    asked before. Whoever goes on with a work that was stopped repeats its questions with `keep`.

    Args:
        model: what reads.
        texts: all texts.
        room: bytes of states to keep, those of the first texts that are asked for; what does not
            fit is read again when it is asked for.
    """

    def __init__(self, model: Matcher, texts: Sequence[str], room: int = 2**31) -> None:
        self.model, self._texts, self._room = model, texts, room
        self._kept: dict[int, Tensor] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Keep what `states` of these rows would keep, without computing more."""
        for part in self._passes(rows):
            if self._room <= 0:
                return
            self._read(part)

    def states(self, rows: Sequence[int]) -> States:
        """Entered states of some of the texts, padded to the longest of them."""
        fresh = [self._read(part) for part in self._passes(rows)]
        found = {**self._kept, **{row: states for part in fresh for row, states in part.items()}}
        hidden = nn.utils.rnn.pad_sequence([found[row] for row in rows], batch_first=True)
        lengths = torch.tensor([len(found[row]) for row in rows], device=hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return States(hidden, mask.long())

    def _passes(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows that are not kept, in passes of texts of similar length."""
        new = [row for row in rows if row not in self._kept]
        chunks = by_length((len(self._texts[row]) for row in new), PAIRS)
        return [[new[place] for place in chunk] for chunk in chunks]

    def _read(self, rows: list[int]) -> dict[int, Tensor]:
        hidden, mask = self.model.text_states([self._texts[row] for row in rows])
        lengths = mask.sum(1).tolist()
        parts = zip(rows, hidden, lengths, strict=True)
        found = {row: states[:length].clone() for row, states, length in parts}
        size = sum(states.nbytes for states in found.values())
        self._room -= size
        if self._room >= 0:
            self._kept |= found
        return found


def score_pairs(
    teacher: FusionTeacher, images: Sequence[Tensor], texts: Sequence[str], pairs: Tensor
) -> Tensor:
    """Scores of (P, 2) rows of `images` and of `texts` → (P,), by a teacher of any kind."""
    out = [
        teacher.score([images[i] for i, _ in chunk], [texts[t] for _, t in chunk])
        for chunk in (rows.tolist() for rows in pairs.split(PAIRS))
    ]
    return torch.cat(out)


def half(depth: int) -> list[int]:
    """Every other layer, the first and the last among them: 6 → 0, 3, 5 as DCD's authors have it.

    >>> half(6), half(12), half(4), half(3), half(2)
    ([0, 3, 5], [0, 3, 5, 7, 9, 11], [0, 3], [2], [1])
    """
    kept = max(1, depth // 2)
    last = list(range(depth - 1, -1, -2))[:kept][::-1]
    return last if kept == 1 else [0, *last[1:]]


def joined(parts: Iterable[States]) -> States:
    """States of several batches in one, padded to the longest."""
    whole = list(parts)
    longest = max(part.mask.shape[1] for part in whole)
    hidden, mask = (torch.cat([padded(part[side], longest) for part in whole]) for side in range(2))
    return States(hidden, mask)


def padded(values: Tensor, length: int) -> Tensor:
    """(B, L, ...) with zeros behind, to (B, length, ...)."""
    short = length - values.shape[1]
    if not short:
        return values
    filler = values.new_zeros(len(values), short, *values.shape[2:])
    return torch.cat([values, filler], dim=1)


def rules_without_padding(rules: str) -> dict[str, Any]:
    """A tokenizer's JSON less the padding and truncation of its last call."""
    return {**json.loads(rules), "padding": None, "truncation": None}
