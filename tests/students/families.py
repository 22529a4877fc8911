"""What the table of docs/students.md says, as data: each tower with its poolings and exports.

`tests/students/test_pairs.py` holds both the students and the table to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from crosstill.progress import quiet
from crosstill.towers import vocabulary

COLOURS = ["red", "blue", "green", "yellow", "violet"]
SHAPES = ["cube", "ball", "cone", "ring"]
CAPTIONS = [f"A {c} {s} left of a {d} {s}." for c in COLOURS for d in COLOURS for s in SHAPES]
# words that no scene has, so that there is something to trim
_MORE = [f"{word} seldom appears in captions" for word in ("elephant", "harbour", "umbrella")]

_LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
_SIDE = {"image_size": 32}
_TWO_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], **_SIDE}


@dataclass(frozen=True)
class Family:
    """A kind of tower.

    Attributes:
        name: what people call it.
        config: of a small one; `model_type` is its name in transformers.
        poolings: that make sense, the usual one first.
        layers: whether `layers` cuts it.
        maps: whether its pooler gives maps (B, W, 1, 1), which plain transformers cannot project.
        tokenizer: of a text tower.
    """

    name: str
    config: dict[str, Any]
    poolings: tuple[str, ...]
    layers: bool = True
    maps: bool = False
    tokenizer: str = ""

    @property
    def type(self) -> str:
        return str(self.config["model_type"])

    def plain(self, pooling: str) -> str:
        """Why it is no part of a `VisionTextDualEncoderModel`; empty where it is."""
        if pooling != "pooler":
            return f'pooled by "{pooling}"'
        return "gives maps" if self.maps else ""


def _vit(kind: str) -> dict[str, Any]:
    return {"model_type": kind, "patch_size": 8, **_SIDE, **_LAYERS}


_TOKEN, _MEAN = ("cls", "mean", "pooler"), ("pooler", "mean")

IMAGE = (
    Family("ViT", _vit("vit"), _TOKEN),
    Family("DeiT", _vit("deit"), _TOKEN),
    Family("DINOv2", _vit("dinov2"), _TOKEN),
    Family(
        "Swin",
        {
            "model_type": "swin",
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 2],
            "window_size": 4,
            **_SIDE,
        },
        _MEAN,
        layers=False,
    ),
    Family(
        "ConvNeXt", {"model_type": "convnext", "num_stages": 2, **_TWO_STAGES}, _MEAN, layers=False
    ),
    Family(
        "ConvNeXt V2",
        {"model_type": "convnextv2", "num_stages": 2, **_TWO_STAGES},
        _MEAN,
        layers=False,
    ),
    Family(
        "FocalNet",
        {
            "model_type": "focalnet",
            "patch_size": 4,
            "embed_dim": 16,
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
            **_TWO_STAGES,
        },
        _MEAN,
        layers=False,
    ),
    Family(
        "ResNet",
        {"model_type": "resnet", "embedding_size": 8, "layer_type": "basic", **_TWO_STAGES},
        _MEAN,
        layers=False,
        maps=True,
    ),
    Family(
        "RegNet",
        {"model_type": "regnet", "embedding_size": 8, "groups_width": 8, **_TWO_STAGES},
        _MEAN,
        layers=False,
        maps=True,
    ),
    Family(
        "MobileNet V1",
        {"model_type": "mobilenet_v1", "depth_multiplier": 0.25, "initializer_range": 0.2, **_SIDE},
        _MEAN,
        layers=False,
    ),
    Family(
        "MobileNet V2",
        {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "initializer_range": 0.2, **_SIDE},
        _MEAN,
        layers=False,
    ),
    Family(
        "MobileViT",
        {
            "model_type": "mobilevit",
            "image_size": 128,  # below, its last attention has a single position
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 12, 16, 16, 16, 32],
            "expand_ratio": 2.0,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        },
        _MEAN,
        layers=False,
    ),
    Family(
        "EfficientNet",
        {
            "model_type": "efficientnet",
            "width_coefficient": 0.1,
            "depth_coefficient": 0.2,
            "hidden_dim": 128,
            "kernel_sizes": [3, 3],
            "in_channels": [32, 80],
            "out_channels": [80, 160],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            **_SIDE,
        },
        _MEAN,
        layers=False,
    ),
    Family(
        "LeViT",
        {
            "model_type": "levit",
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "patch_size": 16,
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
            "image_size": 128,  # 16 pixels a patch, halved twice
        },
        _MEAN,
        layers=False,
    ),
)

TEXT = (
    Family(
        "BERT, MiniLM",
        {"model_type": "bert", **_LAYERS},
        ("mean", "cls", "pooler"),
        tokenizer="WordPiece",
    ),
    Family(
        "ALBERT",
        {"model_type": "albert", "embedding_size": 16, **_LAYERS},
        ("mean", "cls", "pooler"),
        tokenizer="Unigram",
    ),
    Family(
        "DistilBERT",
        {
            "model_type": "distilbert",
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 48,
            "initializer_range": 0.2,
        },
        ("mean", "cls"),
        tokenizer="WordPiece",
    ),
    Family(
        "RoBERTa",
        {"model_type": "roberta", "type_vocab_size": 1, "max_position_embeddings": 66, **_LAYERS},
        ("mean", "cls", "pooler"),
        tokenizer="BPE",
    ),
    Family(
        "ModernBERT",
        {
            "model_type": "modernbert",
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
            **_LAYERS,
        },
        ("mean", "cls"),
        tokenizer="BPE",
    ),
    Family(
        "ELECTRA",
        {"model_type": "electra", "embedding_size": 16, **_LAYERS},
        ("mean", "cls"),
        tokenizer="WordPiece",
    ),
)


def save_image(family: Family, folder: Path, kind: Any = AutoModelForImageClassification) -> Path:
    """A small pretrained-like folder, batch norms far from any batch's; a classifier or `kind`."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(**family.config)
    config.architectures = []  # two classes fit a DeiT
    model = kind.from_config(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # at a start of 0.02 little would reach the end
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    with quiet():
        model.save_pretrained(folder)
    side = family.config["image_size"]
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def save_text(family: Family, folder: Path, kind: Any = AutoModelForMaskedLM) -> Path:
    """A small pretrained-like folder with a tokenizer: a masked language model or `kind`."""
    torch.manual_seed(2)
    tokenizer = TOKENIZERS[family.tokenizer]()
    names = [f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")]
    ids = {name: getattr(tokenizer, name) for name in names}
    config = AutoConfig.for_model(**family.config, vocab_size=len(tokenizer), **ids)
    with quiet():
        kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _wordpiece() -> PreTrainedTokenizerFast:
    return vocabulary.train(CAPTIONS + _MORE * 9, 400)


def _bpe() -> PreTrainedTokenizerFast:
    """As RoBERTa's: bytes, special tokens in front, what pads in the second place."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS + _MORE * 9, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return _named(tokenizer, *special)


def _unigram() -> PreTrainedTokenizerFast:
    """As ALBERT's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["[CLS]", "<pad>", "[SEP]", "<unk>", "[MASK]"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS + _MORE * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return _named(tokenizer, *special)


def _named(tokenizer: Tokenizer, *special: str) -> PreTrainedTokenizerFast:
    names = ("cls", "pad", "sep", "unk", "mask")
    told = {f"{n}_token": t for n, t in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[2], **told
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "WordPiece": _wordpiece,
    "BPE": _bpe,
    "Unigram": _unigram,
}


def table(families: tuple[Family, ...], side: str) -> list[str]:
    """The docs' table of one side, line by line."""
    words = ["tokenizer"] if side == "text" else []
    heads = [f"{side} tower", "`model_type`", "pooling", "`layers`", *words, "`transformers`"]
    rows = [heads, ["---"] * len(heads)]
    for family in families:
        told = [family.tokenizer] if side == "text" else []
        rows.append(
            [
                family.name,
                f"`{family.type}`",
                ", ".join(f"`{p}`" for p in family.poolings),
                "yes" if family.layers else "no",
                *told,
                _plain(family),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _plain(family: Family) -> str:
    if "pooler" not in family.poolings:
        return "no: no pooler"
    return f"no: its pooler {family.plain('pooler')}" if family.plain("pooler") else "by `pooler`"
