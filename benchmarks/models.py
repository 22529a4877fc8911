"""Models of real size, made on the spot: their speed does not depend on what they learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    MobileNetV2Config,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTImageProcessor,
)

TEXT = {
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 8000,
}
STUDENT: dict[str, Any] = {
    "name": "mobilenet-0.5 + 3 layers of 384",
    "image": {"config": {"model_type": "mobilenet_v1", "depth_multiplier": 0.5, "image_size": 160}},
    "text": {"config": {"model_type": "bert", "num_hidden_layers": 3, **TEXT}},
    "batch_norm": "frozen",
}


def teacher(folder: Path, words: list[str]) -> Path:
    """Save a MobileNetV2 (224) + six-layer BERT dual encoder of 512 dimensions."""
    torch.manual_seed(0)
    vision = MobileNetV2Config(image_size=224)
    vision.hidden_size = 1280  # VisionTextDualEncoder asks every image tower for its width
    text = BertConfig(num_hidden_layers=6, **TEXT)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    VisionTextDualEncoderModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
    _tokenizer(words).save_pretrained(folder)
    return folder


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, sep_token="[SEP]", model_max_length=64, **special
    )
