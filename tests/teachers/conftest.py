"""Small dual encoders with random weights, each a complete Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from crosstill.students import vocabulary

TEXTS = ["a red cube", "a blue ball left of a red cube and far from it", "two cones", "ünüsual 🎈"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
SIZE = {"height": 32, "width": 32}


def _clip(words: int) -> Any:
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**SMALL, **ids, "vocab_size": words, "max_position_embeddings": 20}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24))


def _siglip(words: int) -> Any:
    text = {**SMALL, "vocab_size": words, "max_position_embeddings": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=IMAGE))


def _pair(words: int) -> Any:
    text = BertConfig(**SMALL, vocab_size=words, max_position_embeddings=40)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**IMAGE), text, projection_dim=24
    )
    return VisionTextDualEncoderModel(config)


FAMILIES: dict[str, tuple[Callable[[int], Any], Any]] = {
    "clip": (
        _clip,
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIZE),
    ),
    "siglip": (_siglip, SiglipImageProcessorPil(size=SIZE, resample=2)),
    "pair": (_pair, ViTImageProcessorPil(size=SIZE, resample=3)),
}


def make_dual(family: str, folder: Path) -> Path:
    build, processor = FAMILIES[family]
    tokenizer = vocabulary.train(TEXTS * 3, 120)
    tokenizer.model_max_length = 512
    torch.manual_seed(0)
    build(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def dual_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dual(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """A folder to damage."""
    return make_dual("pair", tmp_path / "pair")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS
