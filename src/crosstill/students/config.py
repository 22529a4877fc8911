"""What a student is made of: typed, frozen, read from a preset's name or a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal

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
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    pooling: Pooling
    layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_one_origin(self) -> TowerConfig:
        if (self.source is None) == (self.config is None):
            raise ValueError("give either source or config, and not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config lacks model_type, such as 'bert' or 'resnet'")
        return self


class ImageTowerConfig(TowerConfig):
    """An image tower; its pooler is the average over space of a CNN, or a ViT's own."""

    pooling: Pooling = "pooler"


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
        widths: smaller widths to train as well: see `crosstill.students.matryoshka`.
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
    def _widths_ascend(self) -> StudentConfig:
        if list(self.widths) != sorted({width for width in self.widths if width > 0}):
            raise ValueError("widths ascend from at least 1, such as [32, 64, 128]")
        if self.dim is not None and self.widths and self.widths[-1] > self.dim:
            raise ValueError(f"widths: {self.widths[-1]} is more than dim = {self.dim}")
        return self

    @property
    def freezes_batch_norm(self) -> bool:
        if self.batch_norm == "auto":
            return self.image.source is not None
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
        shape: of "meter": fields of `crosstill.fusion.meter_network.Shape` but for the towers'
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
    def _has_towers(self) -> FusionConfig:
        if (self.fusion == "meter") != (self.towers is not None):
            raise ValueError("fusion = 'meter' needs towers, and nothing else takes them")
        return self


def load_config(preset_or_toml: str | Path) -> StudentConfig | FusionConfig:
    """Read a student's configuration.

    Args:
        preset_or_toml: a preset's name, or a TOML file with the fields of `StudentConfig`, or of
            `FusionConfig` if it has the key `fusion`. A relative `source` in it is looked for
            from here first, then beside the file.

    Raises:
        ConfigError: no such preset or file, or a key or value that cannot be; it is named.
    """
    # The presets are configurations themselves, so they import this file.
    from crosstill.students.presets import PRESETS

    name, path = str(preset_or_toml), Path(preset_or_toml)
    if name in PRESETS:
        return PRESETS[name]
    if path.suffix != ".toml":
        raise unknown("student preset (or .toml file)", name, PRESETS)
    value = _read_toml(path)
    if "fusion" in value:
        return parse_fusion(value, str(path))
    return parse(_with_sources(value, path.parent), str(path))


def parse(value: dict[str, Any], where: str) -> StudentConfig:
    """Check a mapping against `StudentConfig`; `where` opens the error's message."""
    try:
        return StudentConfig.model_validate(value)
    except ValidationError as error:
        raise _explain(error, where) from None


def parse_fusion(value: dict[str, Any], where: str) -> FusionConfig:
    """As `parse`, for `FusionConfig`."""
    try:
        return FusionConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        known = ", ".join(FusionConfig.model_fields)
        raise ConfigError(f"{where}: {key}: {reason}; keys of a fusion model: {known}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a preset's name or a TOML file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable TOML ({error})") from None


def _with_sources(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Point sources that lie beside the file, and not in the current folder, to where they are."""
    found = dict(value)
    for kind in ("image", "text"):
        tower = value.get(kind)
        source = tower.get("source") if isinstance(tower, dict) else None
        beside = isinstance(source, str) and not Path(source).exists()
        if beside and (folder / str(source)).is_dir():
            found[kind] = {**value[kind], "source": str(folder / str(source))}
    return found


def _explain(error: ValidationError, where: str) -> ConfigError:
    found = error.errors(include_url=False)
    # A misspelt key also leaves the right one missing; the spelling is what helps.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    at = [str(part) for part in first["loc"]]
    key = ".".join(at)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{where}: {unknown('key', key, _known(at[:-1]))}")
    if first["type"] == "missing":
        return ConfigError(f"{where}: the key {key!r} is missing; add it")
    reason = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{where}: {key or 'the file'}: {reason}, not {str(first['input'])[:80]!r}")


def _known(path: list[str]) -> list[str]:
    """The full names of the keys that may stand at a place."""
    towers: dict[str, type[_Frozen]] = {"image": ImageTowerConfig, "text": TextTowerConfig}
    model = towers.get("".join(path), StudentConfig)
    return [".".join([*path, name]) for name in model.model_fields]
