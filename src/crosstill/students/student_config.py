"""Configurations of students: typed, frozen, read from a preset's name or a TOML file.

The presets:

    paper         ViT-B/16 and BERT-base with biased heads and the photos of the authors' code, as
                  published; 196 M parameters
    cnn-bert      ConvNeXt-B (ImageNet-22k) and BERT-base: as large as `paper`, towers of two
                  families, for the `towers` table; 198 M
    deit-albert   DeiT-tiny and ALBERT-base: very small towers, for the `towers` table; 17 M
    mobile        MobileNetV2 and three MiniLM layers over a trimmed vocabulary; about 10 M
    mobile-hf     as mobile, but its texts by the pooler: it exports as plain transformers
    tiny          a small ResNet and a small BERT from scratch, for 64 x 64 pixels; 0.7 M
    tiny-hf       as tiny, by the text's pooler, and a FocalNet, for the same export; 0.9 M
    tiny-nested   as tiny, of embeddings of 128 and more that may be cut to 64 or 32
    tiny-teacher  the same kind, five times as large: a teacher of rendered scenes
    half          a score cache's fusion teacher with half of its fusion layers: DCD's student
"""

import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crosstill.errors import ConfigError, unknown

Pooling = Literal["mean", "pooler", "cls"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TowerConfig(_Frozen):
    """One tower: pretrained, from `source`, or started at random from `config`.

    Attributes:
        source: folder or hub id of a model; of a dual encoder the matching tower is taken.
        config: a Hugging Face configuration, `model_type` included, for a random start.
        pooling: how (B, L, W) or (B, W, H, W) hidden states become (B, W).
        layers: keep the first n transformer layers; None keeps all.
        pretrained: of a saved student, whether its weights began from a source.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    pooling: Pooling
    layers: int | None = Field(default=None, ge=1)
    pretrained: bool = False

    @property
    def is_pretrained(self) -> bool:
        """Whether the weights began from a source."""
        return self.source is not None or self.pretrained

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.source is None) == (self.config is None):
            raise ValueError("give either source or config, and not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config lacks model_type, such as 'bert' or 'resnet'")
        return self


class PhotoConfig(_Frozen):
    """The fields of `crosstill.images.Preprocess` that a student sets for itself.

    Those that are None stay as the image tower's folder has them.
    """

    size: tuple[int, int] | None = None
    resize: Literal["squash", "crop"] | None = None
    shorter: int | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class ImageTowerConfig(TowerConfig):
    """An image tower; its pooler is the average over space of a CNN, or a ViT's own.

    Attributes:
        preprocess: how photos are brought to its size, where not as its folder says.
    """

    pooling: Pooling = "pooler"
    preprocess: PhotoConfig = PhotoConfig()


class TextTowerConfig(TowerConfig):
    """A text tower.

    Attributes:
        pooling: "mean" by default, because the pooler of a trimmed tower starts almost constant.
        vocabulary: "trim" keeps the tokens that the training captions use, and enough to encode
            any other text.
        narrow: r, to keep the token table (V, W) as two of (V, r) and (r, W): see `narrow`.
    """

    pooling: Pooling = "mean"
    vocabulary: Literal["full", "trim"] = "full"
    narrow: int | None = Field(default=None, ge=1)


class StudentConfig(_Frozen):
    """A dual encoder: two towers and a linear head each.

    Attributes:
        image: the image tower.
        text: the text tower.
        dim: D, the width of the joint space; None takes that of the teacher.
        widths: smaller widths to train as well: see `crosstill.objectives.wrappers`.
        bias: whether the heads have one.
        max_length: tokens of a caption, special ones included; the rest is cut off.
        batch_norm: whether batch statistics follow the data ("train") or stay as they came
            ("frozen"); "auto" freezes those of pretrained towers.
        name: what to call it in tables.
    """

    kind: ClassVar[Literal["encoder"]] = "encoder"
    image: ImageTowerConfig
    text: TextTowerConfig
    dim: int | None = Field(default=None, ge=1)
    widths: tuple[int, ...] = ()
    bias: bool = False
    max_length: int = Field(default=30, ge=3)
    batch_norm: Literal["auto", "frozen", "train"] = "auto"
    name: str = "student"

    @model_validator(mode="after")
    def _widths_ascend(self) -> Self:
        if list(self.widths) != sorted({width for width in self.widths if width > 0}):
            raise ValueError("widths ascend from at least 1, such as [32, 64, 128]")
        if self.dim is not None and self.widths and self.widths[-1] > self.dim:
            raise ValueError(f"widths: {self.widths[-1]} is more than dim = {self.dim}")
        return self

    @property
    def freezes_batch_norm(self) -> bool:
        if self.batch_norm == "auto":
            return self.image.is_pretrained
        return self.batch_norm == "frozen"


class FusionConfig(_Frozen):
    """A fusion model to train.

    Attributes:
        fusion: "cut" takes a fusion model with some of its layers (DCD's student), "meter" puts
            new co-attention layers on a dual encoder's towers, "vilt" starts a ViLT at random.
        source: of "cut": run, folder or hub id of the model; None takes the score cache's teacher.
        layers: of "cut": which fusion layers to keep; None keeps half of them, 0, 3, 5 of 6.
        towers: of "meter": a student, run or dual teacher whose towers, tokenizer and
            preprocess it takes.
        shape: of "meter": fields of `crosstill.fusion.meter.Shape` but for the towers'
            widths.
        start: of "meter": "joint" begins in the dual encoder's joint space, "random" anywhere.
        config: of "vilt": fields of transformers' ViltConfig.
        max_length: tokens of a caption.
        name: what to call it in tables.
    """

    kind: ClassVar[Literal["matcher"]] = "matcher"
    fusion: Literal["cut", "meter", "vilt"]
    source: str | None = None
    layers: tuple[int, ...] | None = None
    towers: str | None = None
    shape: dict[str, Any] = {}
    start: Literal["joint", "random"] = "joint"
    config: dict[str, Any] = {}
    max_length: int = 40
    name: str = "fusion"

    @model_validator(mode="after")
    def _has_towers(self) -> Self:
        if (self.fusion == "meter") != (self.towers is not None):
            raise ValueError("fusion = 'meter' needs towers, and nothing else takes them")
        return self


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
    """Describe a FocalNet: `VisionTextDualEncoderModel` cannot project a ResNet's pooled maps."""
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


# of the authors' code, also for a ViT that was pretrained on squashed photos of -1..1
_IMAGENET = PhotoConfig(
    size=(224, 224),
    resize="crop",
    shorter=256,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

PRESETS: dict[str, StudentConfig | FusionConfig] = {
    "paper": StudentConfig(
        name="paper",
        image=ImageTowerConfig(
            source="google/vit-base-patch16-224-in21k", pooling="cls", preprocess=_IMAGENET
        ),
        text=TextTowerConfig(source="google-bert/bert-base-uncased", pooling="pooler"),
        bias=True,
    ),
    "cnn-bert": StudentConfig(
        name="cnn-bert",
        image=ImageTowerConfig(source="facebook/convnext-base-224-22k"),
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


def load_config(preset_or_toml: str | Path) -> StudentConfig | FusionConfig:
    """Read a student's configuration.

    Args:
        preset_or_toml: a preset's name, or a TOML file with the fields of `StudentConfig`, or of
            `FusionConfig` if it has the key `fusion`. A relative `source` in it is looked for
            from here first, then beside the file.

    Raises:
        ConfigError: no such preset or file, or a key or value that cannot be; it is named.
    """
    name, path = str(preset_or_toml), Path(preset_or_toml)
    if name in PRESETS:
        return PRESETS[name]
    if path.suffix != ".toml":
        raise unknown("student preset (or .toml file)", name, PRESETS)
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a preset's name or a TOML file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable TOML ({error})") from None
    if "fusion" in value:
        return parse_fusion(value, str(path))
    return parse(_with_sources(value, path.parent), str(path))


def parse(value: dict[str, Any], where: str) -> StudentConfig:
    """Parse a mapping as `StudentConfig`; `where` opens the error's message."""
    try:
        return StudentConfig.model_validate(value)
    except ValidationError as error:
        raise _explain(error, where) from None


def parse_fusion(value: dict[str, Any], where: str) -> FusionConfig:
    """Parse a mapping as `FusionConfig`; `where` opens the error's message."""
    try:
        return FusionConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        known = ", ".join(FusionConfig.model_fields)
        raise ConfigError(f"{where}: {key}: {reason}; keys of a fusion model: {known}") from None


def _with_sources(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve sources that lie beside the file and not in the current folder."""
    resolved = dict(value)
    for kind in ("image", "text"):
        tower = value.get(kind)
        source = tower.get("source") if isinstance(tower, dict) else None
        beside = isinstance(source, str) and not Path(source).exists()
        if beside and (folder / str(source)).is_dir():
            resolved[kind] = {**value[kind], "source": str(folder / str(source))}
    return resolved


def _explain(error: ValidationError, where: str) -> ConfigError:
    errors = error.errors(include_url=False)
    # A misspelt key also leaves the right one missing; the spelling is what helps.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    at = [str(part) for part in first["loc"]]
    key = ".".join(at)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{where}: {unknown('key', key, _known(at[:-1]))}")
    if first["type"] == "missing":
        return ConfigError(f"{where}: the key {key!r} is missing; add it")
    reason = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{where}: {key or 'the file'}: {reason}, not {str(first['input'])[:80]!r}")


def _known(path: list[str]) -> list[str]:
    """List the full names of the keys that may stand at a place."""
    parts: dict[str, type[_Frozen]] = {
        "image": ImageTowerConfig,
        "text": TextTowerConfig,
        "image.preprocess": PhotoConfig,
    }
    model = parts.get(".".join(path), StudentConfig)
    return [".".join([*path, name]) for name in model.model_fields]
