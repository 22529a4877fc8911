"""Small dual encoders with random weights, each a complete folder as its family publishes it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from crosstill.towers import vocabulary
from teachers.fusion_models import lively

TEXTS = ["a red cube", "a blue ball left of a red cube and far from it", "two cones", "ünüsual 🎈"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
SIZE = {"height": 32, "width": 32}
POSITIONS = 40


def _plain(folder: Path) -> int:
    """A tokenizer of no model's class, as a distilled teacher has it."""
    tokenizer = vocabulary.train(TEXTS * 3, 120)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _bert(folder: Path) -> int:
    """A vocab.txt and nothing else, as the older BERT folders have it."""
    words = vocabulary.train(TEXTS * 3, 120).get_vocab()
    _write(folder, "vocab.txt", "\n".join(sorted(words, key=words.__getitem__)) + "\n")
    _config(folder, tokenizer_class="BertTokenizer", model_max_length=512)
    return len(words)


def _merges(words: Iterable[str], end: str) -> list[tuple[str, str]]:
    """Merges that build each word from its left."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + end]
        for at in range(1, len(symbols)):
            merges["".join(symbols[:at]), symbols[at]] = None
    return list(merges)


def _byte_pairs(folder: Path, end: str, special: list[str]) -> int:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(["red", "cube", "ball", "Ġa", "Ġred"], end)
    first = [] if end else special
    pieces = [*first, *letters, *(letter + end for letter in letters if end)]
    pieces += [left + right for left, right in merges] + (special if end else [])
    ids = {piece: row for row, piece in enumerate(dict.fromkeys(pieces))}
    _write(folder, "vocab.json", json.dumps(ids))
    lines = [" ".join(pair) for pair in merges]
    _write(folder, "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")
    return len(ids)


def _clip(folder: Path) -> int:
    words = _byte_pairs(folder, "</w>", ["<|startoftext|>", "<|endoftext|>"])
    _config(folder, tokenizer_class="CLIPTokenizer", pad_token="<|endoftext|>")
    return words


def _roberta(folder: Path) -> int:
    words = _byte_pairs(folder, "", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    _config(folder, tokenizer_class="RobertaTokenizer", model_max_length=512)
    return words


def _xlm_roberta(folder: Path) -> int:
    rules = Tokenizer(models.Unigram())
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    rules.train_from_iterator(TEXTS * 3, trainer)
    pieces = [tuple(row) for row in json.loads(rules.to_str())["model"]["vocab"]]
    tokenizer = hf.XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _sentencepiece(folder: Path) -> int:
    import sentencepiece

    text, prefix = folder / "text", folder / "spiece"
    text.write_text("\n".join(TEXTS * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=28,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    text.unlink(), prefix.with_suffix(".vocab").unlink()
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _config(folder, tokenizer_class="SiglipTokenizer", model_max_length=64, **special)
    return 28


def _gemma(folder: Path) -> int:
    rules = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rules.normalizer = normalizers.Replace(" ", "▁")
    rules.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    rules.train_from_iterator(TEXTS * 5, trainer)
    rules.post_processor = processors.TemplateProcessing(
        single="$A:0 <eos>:0", pair="$A:0 <eos>:0 $B:1 <eos>:1", special_tokens=[("<eos>", 1)]
    )
    rules.save(str(folder / "tokenizer.json"))
    tokens = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    adds = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    _config(folder, tokenizer_class="GemmaTokenizer", **adds, **tokens)
    return rules.get_vocab_size()


def _write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


def _config(folder: Path, **values: Any) -> None:
    _write(folder, "tokenizer_config.json", json.dumps(values))


def clip(words: int, **text: Any) -> Any:
    ids = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}
    text = {**SMALL, **ids, "vocab_size": words, "max_position_embeddings": POSITIONS, **text}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24))


def laion(words: int) -> Any:
    """OpenCLIP's form: another activation, and the end token's id that transformers had wrong."""
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text = {**SMALL, **ids, "vocab_size": words, "max_position_embeddings": POSITIONS}
    act = {"hidden_act": "gelu"}
    config = hf.CLIPConfig(
        text_config={**text, **act}, vision_config={**IMAGE, **act}, projection_dim=24
    )
    return hf.CLIPModel(config)


def _plain_clip(words: int) -> Any:
    return clip(words, bos_token_id=2, eos_token_id=3, pad_token_id=0)


def _siglip(words: int) -> Any:
    text = {
        **SMALL,
        "vocab_size": words,
        "max_position_embeddings": POSITIONS,
        "projection_size": 32,
    }
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=IMAGE))


def _align(words: int) -> Any:
    text = {**SMALL, "vocab_size": words, "max_position_embeddings": POSITIONS}
    image = {
        "image_size": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": 32,
        "in_channels": [32, 16],
        "out_channels": [16, 32],
        "kernel_sizes": [3, 3],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
    }
    config = {"projection_dim": 32, "temperature_init_value": 0.5}
    model = hf.AlignModel(hf.AlignConfig(text_config=text, vision_config=image, **config))
    lively(model.text_model)  # of the convolutions, larger weights would drown each other
    return model


def _altclip(words: int) -> Any:
    ids = {"pad_token_id": 1, "type_vocab_size": 1, "project_dim": 24}
    text = {**SMALL, **ids, "vocab_size": words, "max_position_embeddings": POSITIONS + 2}
    return hf.AltCLIPModel(
        hf.AltCLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24)
    )


def _chinese_clip(words: int) -> Any:
    text = {**SMALL, "vocab_size": words, "max_position_embeddings": POSITIONS}
    return hf.ChineseCLIPModel(
        hf.ChineseCLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24)
    )


def _metaclip_2(words: int) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text = {**SMALL, **ids, "vocab_size": words, "max_position_embeddings": POSITIONS}
    return hf.MetaClip2Model(
        hf.MetaClip2Config(text_config=text, vision_config=IMAGE, projection_dim=24)
    )


def _blip(words: int) -> Any:
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": words, "max_position_embeddings": POSITIONS, "encoder_hidden_size": 32}
    config = hf.BlipConfig(
        text_config={**SMALL, **ids, **text}, vision_config=IMAGE, image_text_hidden_size=24
    )
    return hf.BlipForImageTextRetrieval(config)


def _pair(words: int, text: Any = None) -> Any:
    text = text or hf.BertConfig(**SMALL, vocab_size=words, max_position_embeddings=POSITIONS)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**IMAGE), text, projection_dim=24
    )
    return hf.VisionTextDualEncoderModel(config)


def _roberta_pair(words: int) -> Any:
    sizes = {"vocab_size": words, "max_position_embeddings": POSITIONS + 2}
    return _pair(words, hf.RobertaConfig(**SMALL, **sizes, pad_token_id=1, type_vocab_size=1))


class Family(NamedTuple):
    """How a family's folder is made.

    `made` holds the weights as they are made; others are drawn anew, larger, so that all tells.
    """

    build: Callable[[int], Any]
    tokenizer: Callable[[Path], int]
    processor: Any
    made: bool = False


CROP = hf.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIZE)
SQUASH = hf.SiglipImageProcessorPil(size=SIZE, resample=2)
ALIGN = hf.EfficientNetImageProcessorPil(
    size={"height": 38, "width": 38},
    crop_size=SIZE,
    do_center_crop=True,
    resample=2,
    rescale_factor=1 / 127.5,
    rescale_offset=True,
    do_normalize=False,
    include_top=False,
)
SIMPLE = {
    "clip": Family(_plain_clip, _plain, CROP, made=True),
    "siglip": Family(_siglip, _plain, SQUASH, made=True),
    "pair": Family(_pair, _plain, hf.ViTImageProcessorPil(size=SIZE, resample=3), made=True),
}
FAMILIES = {
    "clip": Family(clip, _clip, CROP),
    "openclip": Family(laion, _clip, CROP),
    "metaclip_2": Family(_metaclip_2, _xlm_roberta, CROP),
    "siglip": Family(_siglip, _sentencepiece, SQUASH),
    "siglip2": Family(_siglip, _gemma, SQUASH),
    "align": Family(_align, _bert, ALIGN, made=True),
    "altclip": Family(_altclip, _xlm_roberta, CROP),
    "chinese_clip": Family(
        _chinese_clip, _bert, hf.ChineseCLIPImageProcessorPil(size=SIZE, do_center_crop=False)
    ),
    "blip": Family(_blip, _bert, hf.BlipImageProcessorPil(size=SIZE)),
    "pair-bert": Family(_pair, _bert, hf.ViTImageProcessorPil(size=SIZE, resample=3)),
    "pair-roberta": Family(_roberta_pair, _roberta, hf.ViTImageProcessorPil(size=SIZE)),
}


def save(family: Family, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = family.tokenizer(folder)
    model = family.build(words)
    (model if family.made else lively(model)).save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder
