"""Captions, and small towers with random weights, each a complete Hugging Face folder."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, MobileNetV1Config, MobileNetV1Model

from crosstill.students.student_config import ImageTowerConfig, StudentConfig, TextTowerConfig
from crosstill.towers import vocabulary

COLOURS = ["red", "blue", "green", "yellow", "violet"]
SHAPES = ["cube", "ball", "cone", "ring"]
PREPROCESSOR = """{"image_processor_type": "ViTImageProcessor", "do_resize": true, "resample": 2,
"size": {"height": 40, "width": 40}, "do_rescale": true, "rescale_factor": 0.00392156862745098,
"do_normalize": true, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5]}"""


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return [f"A {c} {s} left of a {d} {s}." for c in COLOURS for d in COLOURS for s in SHAPES]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained-like CNN: batch norms whose statistics are far from those of any batch."""
    folder = tmp_path_factory.mktemp("image")
    torch.manual_seed(1)
    model = MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.25, image_size=32))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PREPROCESSOR)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> Path:
    """A BERT of three layers whose tokenizer knows more words than the captions use."""
    folder = tmp_path_factory.mktemp("text")
    more = [f"{word} seldom appears in captions" for word in ("elephant", "harbour", "umbrella")]
    tokenizer = vocabulary.train(captions + more * 9, 400)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pretrained(image_folder: Path, text_folder: Path) -> StudentConfig:
    return StudentConfig(
        image=ImageTowerConfig(source=str(image_folder)),
        text=TextTowerConfig(source=str(text_folder), layers=2, vocabulary="trim"),
    )
