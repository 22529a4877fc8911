"""Any Hugging Face dual encoder as a teacher: CLIP, SigLIP, VisionTextDualEncoder, ALIGN, ..."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstill import files
from crosstill.data.base import read_licence
from crosstill.errors import ModelError
from crosstill.images import normalise
from crosstill.teachers import hugging_face
from crosstill.teachers.base import TEXTS, embed_by_length, embed_pixels, encodable, unit

# They read every position, padding included, and were trained without an attention mask.
_PADDED = frozenset({"siglip", "siglip2"})


class DualEncoder:
    """A frozen pair of towers with one joint space; see `Teacher` for what it offers.

    Args:
        folder: of config, safetensors, tokenizer and image processor.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError: it is no dual encoder, or the folder lacks one of those parts.
    """

    modalities = frozenset({"image", "text"})

    def __init__(self, folder: Path, name: str, device: torch.device | None = None) -> None:
        config = hugging_face.read_config(folder)
        self.folder, self.name, self.family = folder, name, str(config.model_type)
        self.source = str(folder.absolute())
        # The cheap parts first, so that a folder that lacks one says so at once.
        self.tokenizer = hugging_face.read_tokenizer(folder)
        self.preprocess = hugging_face.read_preprocess(folder)
        self.licence = read_licence(folder)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self._read_model(config)
        self.max_length = _max_length(self.tokenizer, config)
        # Rendered before the first call, which would write its own padding into it.
        self._tokenizer_rules = _rules(self.tokenizer)
        self.dim = self.embed_texts(["a"]).shape[1]

    def _read_model(self, config: Any) -> Any:
        model = hugging_face.read_model(self.folder, config)
        if not all(hasattr(model, f"get_{kind}_features") for kind in self.modalities):
            raise ModelError(
                f"{self.folder}: {type(model).__name__} is no dual encoder (an image tower and a "
                "text tower with one joint space); name one such as CLIP or SigLIP"
            )
        # Half the time for convolutions on a CPU; nothing changes for matrix products.
        return model.requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    @cached_property
    def _identity(self) -> dict[str, str]:
        config = self.model.config
        towers = (config.vision_config, config.text_config)
        rules = {**self._tokenizer_rules, "max_length": self.max_length}
        return {
            "weights": hugging_face.weights_digest(self.folder),
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json(rules),
            "activation": "/".join(str(getattr(t, "hidden_act", "none")) for t in towers),
            "family": self.family,
        }

    def identity(self) -> dict[str, str]:
        return dict(self._identity)

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor) -> Tensor:
        if not len(pixels):
            return torch.empty(0, self.dim)
        return unit(embed_pixels(pixels, self._encode_images, self.device), self.name)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.empty(0, self.dim)
        return unit(embed_by_length(texts, self._encode_texts, TEXTS), self.name)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model can read."""
        plain = [encodable(text) for text in texts]
        ids = self.tokenizer(plain, truncation=False, verbose=False)["input_ids"] if plain else []
        return sum(len(row) > self.max_length for row in ids)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        values = normalise(pixels, self.preprocess).contiguous(memory_format=torch.channels_last)
        return _rows(self.model.get_image_features(pixel_values=values))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            [encodable(text) for text in texts],
            padding="max_length" if self.family in _PADDED else "longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        if self.family in _PADDED:
            tokens = {"input_ids": tokens["input_ids"]}
        inputs = {name: value.to(self.device) for name, value in tokens.items()}
        return _rows(self.model.get_text_features(**inputs))


def _rows(output: Any) -> Tensor:
    """The features, which transformers 5 wraps in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _max_length(tokenizer: Any, config: Any) -> int:
    text = config.text_config
    positions = getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa counts positions from behind its padding id.
    if "roberta" in str(text.model_type) or config.model_type == "altclip":
        positions -= (text.pad_token_id or 0) + 1
    return int(min(tokenizer.model_max_length, positions))


def _rules(tokenizer: Any) -> dict[str, Any]:
    """What the tokenizer does to a text, less the padding and truncation of its last call."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    side = {"padding_side": tokenizer.padding_side, "pad_token": tokenizer.pad_token}
    return {**rules, **side, "padding": None, "truncation": None}
