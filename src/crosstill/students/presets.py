"""Students by name.

paper         ViT-B/16 and BERT-base with biased heads, as published; 196 M parameters
cnn-bert      ResNet-50 and BERT-base: towers of two families, for the `towers` table
deit-albert   DeiT-tiny and ALBERT-base: very small towers, for the `towers` table
mobile        MobileNetV2 and three MiniLM layers over a trimmed vocabulary; about 10 M
mobile-hf     as mobile, but its texts by the pooler: it exports as plain transformers
tiny          a small ResNet and a small BERT from scratch, for 64 x 64 pixels; 0.7 M
tiny-hf       as tiny, by the text's pooler, and a FocalNet, for the same export; 0.9 M
tiny-nested   as tiny, of embeddings of 128 and more that may be cut to 64 or 32
tiny-teacher  the same kind, five times as large: the teacher of the demonstration
half          a score cache's fusion teacher with half of its fusion layers: DCD's student
"""

from __future__ import annotations

from typing import Any

from crosstill.students.config import FusionConfig, ImageTowerConfig, StudentConfig, TextTowerConfig


def _resnet(width: int, stages: list[int]) -> dict[str, Any]:
    return {
        "model_type": "resnet",
        "embedding_size": width,
        "hidden_sizes": stages,
        "depths": [1] * len(stages),
        "layer_type": "basic",
        "image_size": 64,
    }


def _bert(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "vocab_size": 2000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _focalnet() -> dict[str, Any]:
    """A ResNet's pooler gives maps, which `VisionTextDualEncoderModel` cannot project."""
    return {
        "model_type": "focalnet",
        "embed_dim": 32,
        "hidden_sizes": [32, 64, 128],
        "depths": [1, 1, 2],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
        "patch_size": 4,
        "image_size": 64,
        "drop_path_rate": 0.0,
        "initializer_range": 0.1,
    }


PRESETS: dict[str, StudentConfig | FusionConfig] = {
    "paper": StudentConfig(
        name="paper",
        image=ImageTowerConfig(source="google/vit-base-patch16-224-in21k", pooling="cls"),
        text=TextTowerConfig(source="google-bert/bert-base-uncased", pooling="pooler"),
        bias=True,
    ),
    "cnn-bert": StudentConfig(
        name="cnn-bert",
        image=ImageTowerConfig(source="microsoft/resnet-50"),
        text=TextTowerConfig(source="google-bert/bert-base-uncased", pooling="pooler"),
        bias=True,
    ),
    "deit-albert": StudentConfig(
        name="deit-albert",
        image=ImageTowerConfig(source="facebook/deit-tiny-patch16-224", pooling="cls"),
        text=TextTowerConfig(source="albert/albert-base-v2", pooling="pooler"),
        bias=True,
    ),
    "mobile": StudentConfig(
        name="mobile",
        image=ImageTowerConfig(source="google/mobilenet_v2_1.0_224"),
        text=TextTowerConfig(
            source="sentence-transformers/all-MiniLM-L6-v2", layers=3, vocabulary="trim"
        ),
    ),
    "mobile-hf": StudentConfig(
        name="mobile-hf",
        image=ImageTowerConfig(source="google/mobilenet_v2_1.0_224"),
        text=TextTowerConfig(
            source="sentence-transformers/all-MiniLM-L6-v2",
            pooling="pooler",
            layers=3,
            vocabulary="trim",
        ),
    ),
    "tiny": StudentConfig(
        name="tiny",
        image=ImageTowerConfig(config=_resnet(16, [32, 64, 128])),
        text=TextTowerConfig(config=_bert(128, 2)),
    ),
    "tiny-hf": StudentConfig(
        name="tiny-hf",
        image=ImageTowerConfig(config=_focalnet()),
        # BERT's own 0.02 would start its pooler almost constant.
        text=TextTowerConfig(config={**_bert(128, 2), "initializer_range": 0.05}, pooling="pooler"),
    ),
    "tiny-teacher": StudentConfig(
        name="tiny-teacher",
        image=ImageTowerConfig(config=_resnet(64, [64, 128, 256])),
        text=TextTowerConfig(config=_bert(256, 4)),
    ),
    "tiny-nested": StudentConfig(
        name="tiny-nested",
        image=ImageTowerConfig(config=_resnet(16, [32, 64, 128])),
        text=TextTowerConfig(config=_bert(128, 2)),
        widths=(32, 64, 128),
    ),
    "half": FusionConfig(fusion="cut", name="half"),
}
