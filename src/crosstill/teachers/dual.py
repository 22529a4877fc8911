"""Any Hugging Face dual encoder as a teacher; what its family needs is found by its config.

Some models that read pairs have contrastive heads too, which are dual encoders:

BLIP         Li et al., arXiv 2201.12086: `BlipForImageTextRetrieval`, only where it is asked for
             by "dual:", because the same folder's fusion model is what a name alone means
BridgeTower  Xu et al., arXiv 2206.08657: `BridgeTowerForContrastiveLearning`
"""

import json
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval, BridgeTowerForContrastiveLearning

from crosstill import files
from crosstill.data.pairs import read_licence
from crosstill.errors import ModelError
from crosstill.formats import encodable
from crosstill.images import normalise
from crosstill.teachers.base import TwoTowers
from crosstill.towers import hub, processors
from crosstill.towers.tower_parts import additive

PREFIX = "dual:"  # in front of a source: its contrastive heads, not what reads pairs
TYPES = {"text": 0, "image": 1}  # rows of BridgeTower's token type embeddings
FAMILIES = (
    "align",
    "altclip",
    "blip",
    "chinese_clip",
    "clip",
    "metaclip_2",
    "siglip",
    "vision-text-dual-encoder",
)
# They read every position, padding included, and were trained without an attention mask.
_PADDED = frozenset({"siglip"})


class DualEncoder(TwoTowers):
    """A frozen pair of towers with one joint space; see `Teacher` for what it offers.

    Args:
        folder: of config, safetensors, tokenizer and image processor.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.

    Attributes:
        max_length: the longest text that it reads, in tokens.
        logit_scale: what its cosines are multiplied by before its softmax or sigmoid, 1 over the
            temperature; None where the folder does not keep it.
        logit_bias: what is added after that, as SigLIP does; None for the others.

    Raises:
        ModelError: it is no dual encoder, or the folder lacks one of those parts.
    """

    def __init__(self, folder: Path, name: str, device: torch.device | None = None) -> None:
        config = hub.read_config(folder)
        self.folder, self.name, self.family = folder, name, str(config.model_type)
        self.source = str(folder.absolute())
        # The cheap parts first, so that a folder that lacks one says so at once.
        self.tokenizer = hub.read_tokenizer(folder, fast=False)
        if self.family == "siglip":
            _lower_gemma(self.tokenizer)
        self.preprocess = processors.read_preprocess(folder)
        self.licence = read_licence(folder)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self._read_model(config)
        self.max_length = _max_length(self.tokenizer, self.model)
        self.logit_scale, self.logit_bias = logits(self.model, folder)
        # Rendered before the first call, which would write its own padding into it.
        self._tokenizer_rules = tokenizer_rules(self.tokenizer)
        self.dim = self._try_out()

    def _read_model(self, config: Any) -> Any:
        if self.family not in FAMILIES:
            kind = type(config).__name__.removesuffix("Config")
            raise ModelError(
                f"{self.folder}: {kind}Model is no dual encoder (an image tower and a text tower "
                f"with one joint space) that crosstill reads; it reads {', '.join(FAMILIES)}"
            )
        model = hub.read_model(self.folder, config)
        # Half the time for convolutions on a CPU; nothing changes for matrix products.
        return model.requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    def _try_out(self) -> int:
        """Embed a little, so that parts that do not fit each other say so at once → D."""
        black = torch.zeros(1, 3, *self.preprocess.size, dtype=torch.uint8)
        with hub.reading(self.folder, "model, fed by its tokenizer and image processor,"):
            texts, image = self.embed_texts(["a", "a a a"]), self.embed_images(black)
        if texts.shape[1] != image.shape[1]:
            raise ModelError(
                f"{self.folder}: no joint space: its images have {image.shape[1]} dimensions and "
                f"its texts {texts.shape[1]}"
            )
        if torch.allclose(texts[0], texts[1], rtol=0, atol=1e-6):  # pooled at a token before them
            raise ModelError(
                f"{self.folder}: all texts give one row; is its tokenizer's end token the "
                "eos_token_id of its config.json?"
            )
        return texts.shape[1]

    def _identify(self) -> dict[str, str]:
        config = self.model.config
        towers = (config.vision_config, config.text_config)
        rules = {**self._tokenizer_rules, "max_length": self.max_length}
        return {
            "weights": hub.weights_digest(self.folder),
            "preprocess": self.preprocess.digest(),
            "tokenizer": files.digest_json(rules),
            "activation": "/".join(str(getattr(t, "hidden_act", "none")) for t in towers),
            "family": self.family,
        }

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the model can read."""
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
    """Return the features, which transformers 5 wraps in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _lower_gemma(tokenizer: Any) -> None:
    """Make SigLIP 2's tokenizer write small letters, with which it was trained.

    Tschannen et al., arXiv 2502.14786, section 2.1. The published folders name Gemma's class, which
    keeps capitals.
    """
    if type(tokenizer).__name__.startswith("Gemma"):
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = normalizers.Sequence([step for step in steps if step is not None])


def _max_length(tokenizer: Any, model: Any) -> int:
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind their padding id.
    taken = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if module.padding_idx is not None
    ]
    return int(min(tokenizer.model_max_length, (positions or math.inf) - max(taken, default=0)))


def logits(model: Any, source: Path | str) -> tuple[float | None, float | None]:
    """Read the scale and the bias of a model's logits, where it has them."""
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    scale = None if scale is None else float(scale.exp())
    if hasattr(model, "temperature"):  # ALIGN divides by it
        scale = 1 / float(model.temperature)
    bias = None if bias is None else float(bias)
    if not all(value is None or math.isfinite(value) for value in (scale, bias)):
        raise ModelError(f"{source}: its logit scale or bias is not finite; check its weights")
    return scale, bias


def tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    """Return a tokenizer's rules, without the padding and truncation of its last call."""
    side = {"padding_side": tokenizer.padding_side, "pad_token": tokenizer.pad_token}
    if not hasattr(tokenizer, "backend_tokenizer"):  # SigLIP's, around a SentencePiece model
        kind = {"class": type(tokenizer).__name__, "special": tokenizer.special_tokens_map}
        lower = getattr(tokenizer, "do_lower_case", None)
        model = files.digest_file(Path(tokenizer.vocab_file))
        return {**side, **kind, "lower": lower, "model": model}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**rules, **side, "padding": None, "truncation": None}


class BlipDual(DualEncoder):
    """The dual encoder within a retrieval checkpoint: its towers and contrastive heads.

    The same folder's `Blip` re-ranks what this one finds.
    """

    def _read_model(self, config: Any) -> Any:
        processors.check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # without an image to look at, the text encoder's cross-attention does nothing
        config.text_config.is_decoder = False
        model = hub.read_model(self.folder, config, kind=BlipForImageTextRetrieval)
        self.family = "blip-itc"
        return _BlipHeads(model).requires_grad_(False).to(self.device)


class _BlipHeads(nn.Module):
    """BLIP's towers and contrastive heads, as `DualEncoder` calls a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.vision_model, self.vision_proj = model.vision_model, model.vision_proj
        self.text_encoder, self.text_proj = model.text_encoder, model.text_proj

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        hidden = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.vision_proj(hidden[:, 0])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.text_proj(output.last_hidden_state[:, 0])


class BridgeTowerDual(DualEncoder):
    """The dual encoder within a `BridgeTowerForContrastiveLearning` folder."""

    def _read_model(self, config: Any) -> Any:
        processors.check_size(self.folder, self.preprocess, config.vision_config.image_size)
        # RoBERTa counts positions from behind its padding id
        limit = min(self.tokenizer.model_max_length, text_positions(config))
        self.tokenizer.model_max_length = limit
        kind = BridgeTowerForContrastiveLearning
        model = hub.read_model(self.folder, config, kind=kind)
        self.family = "bridgetower-itc"
        return _BridgeTowerHeads(model).requires_grad_(False).to(self.device)


class _BridgeTowerHeads(nn.Module):
    """BridgeTower's towers and contrastive heads, as `DualEncoder` calls a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        core, self.config = model.bridgetower, model.config
        self.vision_model, self.text_model = core.vision_model, core.text_model
        self.transform, self.types = core.cross_modal_image_transform, core.token_type_embeddings
        self.image_head, self.text_head = model.itc_image_head, model.itc_text_head
        self.logit_scale = model.logit_scale

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        first = self.transform(image_outputs(self, pixel_values, 1)[:, 0, 0])
        return self.image_head(first + self.types.weight[TYPES["image"]])

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Tensor:
        return self.text_head(text_outputs(self, input_ids, attention_mask, 1)[:, 0, 0])


def image_outputs(core: Any, values: Tensor, last: int) -> Tensor:
    """Run BridgeTower's image tower: normalised pixels → its last outputs (B, L, last, W)."""
    visual = core.vision_model.visual
    blocks = visual.transformer.resblocks[: len(core.text_model.encoder.layer)]
    first = visual.forward_pre(values)
    outputs = list(accumulate(blocks, lambda x, block: block(x), initial=first))
    return torch.stack([visual.forward_post(hidden) for hidden in outputs[-last:]], dim=2)


def text_outputs(core: Any, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """Run BridgeTower's text tower: ids and mask (B, L) → its last outputs (B, L, last, W)."""
    text, added = core.text_model, additive(mask)
    first = text.embeddings(input_ids=ids)
    outputs = list(accumulate(text.encoder.layer, lambda x, layer: layer(x, added), initial=first))
    return torch.stack(outputs[-last:], dim=2)


def text_positions(config: Any) -> int:
    """Count the tokens that BridgeTower has positions for; RoBERTa counts from its padding id."""
    text = config.text_config
    return int(text.max_position_embeddings - (text.pad_token_id or 0) - 1)


# by the architecture that config.json names: always, and of models that also read pairs
_ALWAYS: dict[str, type[DualEncoder]] = {"BridgeTowerForContrastiveLearning": BridgeTowerDual}
_ASKED: dict[str, type[DualEncoder]] = {**_ALWAYS, "BlipForImageTextRetrieval": BlipDual}
_QUERIES = "Blip2ForImageTextRetrieval"  # has contrastive heads, of many rows an image


def holds(folder: Path) -> bool:
    """Tell whether a folder's model has contrastive heads, and is not better used whole."""
    return any(name in {*_ALWAYS, _QUERIES} for name in hub.architectures(folder))


def has_heads(folder: Path) -> bool:
    """Tell whether a folder's model has contrastive heads, though it may read pairs too."""
    return any(name in _ASKED for name in hub.architectures(folder))


def load(folder: Path, name: str, device: torch.device | None = None) -> DualEncoder:
    """Load the contrastive heads of a folder's model as a dual encoder.

    Args:
        folder: of a model of transformers.
        name: what to call it in tables.
        device: where to compute; None takes a GPU when there is one.

    Raises:
        ModelError: the model has no contrastive heads, has several rows an image, or does not load.
    """
    if _QUERIES in hub.architectures(folder):
        raise ModelError(
            f"{folder}: BLIP-2 gives an image a row for each query and scores by the best of them, "
            "and a dual encoder has one row an image; choose another teacher, such as a CLIP or a "
            "SigLIP"
        )
    heads = next((_ASKED[name] for name in hub.architectures(folder) if name in _ASKED), None)
    if heads is None:
        raise ModelError(
            f"{folder}: no model that reads pairs and has contrastive heads too; leave out {PREFIX}"
        )
    return heads(folder, name, device)
