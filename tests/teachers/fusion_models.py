"""Small fusion models of transformers with random weights, each a complete folder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerImageProcessorPil,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltImageProcessorPil,
)

from crosstill.towers import vocabulary

TEXTS = ["a red cube", "a blue ball left of a red cube and far from it", "two cones", "ünüsual 🎈"]
LAYERS = 3


def vilt(words: int, layers: int = LAYERS) -> Any:
    config = ViltConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    return ViltForImageAndTextRetrieval(config)


def blip(words: int, layers: int = LAYERS) -> Any:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": words, "max_position_embeddings": 40, "encoder_hidden_size": 32}
    image = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = BlipConfig(
        text_config={**size, **ids, **text, "num_hidden_layers": layers},
        vision_config={**size, **image},
        image_text_hidden_size=24,
    )
    return BlipForImageTextRetrieval(config)


def bridgetower(words: int, layers: int = LAYERS, **changes: Any) -> Any:
    config = bridgetower_config(words, layers, **changes)
    return BridgeTowerForImageAndTextRetrieval(config)


def bridgetower_dual(words: int) -> Any:
    extra = {"contrastive_hidden_size": 24, "logit_scale_init_value": 2.6}
    return BridgeTowerForContrastiveLearning(bridgetower_config(words, **extra))


def bridgetower_config(words: int, layers: int = LAYERS, **changes: Any) -> BridgeTowerConfig:
    towers = {"hidden_size": 64, "num_hidden_layers": 4}
    text = {"vocab_size": words, "max_position_embeddings": 40, "pad_token_id": 0}
    heads = {"num_attention_heads": 2, "intermediate_size": 96}
    return BridgeTowerConfig(
        **heads,
        hidden_size=64,
        num_hidden_layers=layers,
        text_config={**towers, **text, **heads},
        vision_config={**towers, "image_size": 32, "patch_size": 8},
        **changes,
    )


def bridgetower_unshared(words: int) -> Any:
    changes = {"share_cross_modal_transformer_layers": False, "link_tower_type": "interpolate"}
    return bridgetower(words, **changes)


SQUASH = BlipImageProcessorPil(size={"height": 32, "width": 32})
CROP = BridgeTowerImageProcessorPil(
    size={"shortest_edge": 32}, crop_size={"shortest_edge": 32}, size_divisor=8
)
FAMILIES: dict[str, tuple[Callable[[int], Any], Any]] = {
    "vilt": (vilt, ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)),
    "blip": (blip, SQUASH),
    "bridgetower": (bridgetower, CROP),
    "bridgetower-unshared": (bridgetower_unshared, CROP),
    "bridgetower-dual": (bridgetower_dual, CROP),
}


def save(family: str, folder: Path, captions: Sequence[str] = TEXTS) -> Path:
    """Write a model of a family, its tokenizer and its image processor."""
    build, processor = FAMILIES[family]
    tokenizer = vocabulary.train(list(captions) * 3, 120)
    tokenizer.model_max_length = 40
    torch.manual_seed(0)
    lively(build(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def lively(model: nn.Module) -> nn.Module:
    """Larger weights than a new model has, and no zeros, so that every part tells in a score."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn_like(parameter)
            norm = any(part in name.lower() for part in ("norm", "ln_")) and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else 0.1 * noise)
    return model
