"""A student's preprocess and tokenizer in the words of transformers."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, ViTImageProcessorPil

from crosstill.preprocess import Preprocess
from crosstill.students.student import Student
from crosstill.towers import narrow

_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def hindrances(preprocess: Preprocess) -> list[str]:
    """Why no image processor of transformers' plain two does what this preprocess says."""
    if preprocess.resize == "fit":
        return ['photos that keep their shape (preprocess "fit")']
    if preprocess.longer is not None or preprocess.multiple != 1:
        return ["photos whose longer side is bounded or rounded (preprocess longer, multiple)"]
    return []


def image_processor(preprocess: Preprocess) -> Any:
    """ViT's image processor for "squash", CLIP's for "crop"; see `hindrances` for the others.

    It is saved under the name that transformers resolves with torchvision or without.
    """
    height, width = preprocess.size
    size = {"height": height, "width": width}
    common: dict[str, Any] = {
        "resample": _FILTERS[preprocess.interpolation],
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }
    if preprocess.resize == "squash":
        return ViTImageProcessorPil(size=size, **common)
    shorter = preprocess.shorter or max(preprocess.size)
    return CLIPImageProcessorPil(size={"shortest_edge": shorter}, crop_size=size, **common)


def tokenizer(student: Student) -> PreTrainedTokenizerFast:
    """The student's tokenizer, which cuts at its `max_length` when asked for truncation."""
    held = student.tokenizer
    names = dict(held.special_tokens_map)
    # What fills a text up is masked, so any token will do where none was meant for it.
    names.setdefault("pad_token", held.eos_token or held.unk_token)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(held.backend_tokenizer.to_str()),
        model_max_length=student.config.max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **names,
    )


def tower(module: nn.Module) -> Any:
    """A copy of a tower, as other libraries want it: saving one writes into its configuration."""
    again = narrow.whole(module)
    return again.to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()


def pools_to_rows(student: Student) -> bool:
    """Whether the image tower's pooler gives rows (B, W); some CNNs give maps (B, W, 1, 1)."""
    black = torch.zeros(1, 3, *student.preprocess.size)
    with torch.inference_mode():
        return tower(student.image_tower)(pixel_values=black).pooler_output.ndim == 2
