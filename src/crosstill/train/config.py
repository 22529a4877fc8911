"""The settings of one distillation: typed, frozen, and refused where they cannot work."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from crosstill.errors import ConfigError, did_you_mean

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(BaseModel):
    """One run. The defaults are the published setting of DSMD (arXiv 2404.10838, section 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = "dsmd"
    losses: dict[str, dict[str, Any]] = {
        "contrastive": {},
        "feature": {},
        "similarity": {},
        "hard_negative": {},
    }
    balance: dict[str, Any] = {"name": "dsmd"}

    epochs: Positive = 20
    steps_per_epoch: Positive | None = None  # None: every caption once
    batch_size: Positive = 64  # photos and texts per step, over all processes
    # of pairs in a batch where some photos have no captions or texts no photo, see `Sampler`
    paired_share: Annotated[float, Field(ge=0, le=1)] | None = None
    captions_per_image: Positive = 1  # captions of one image in a batch; its pixels pass once
    shuffle: bool = True  # False: captions in the order of the data, as DSMD's released code
    chunk_size: Positive | None = None  # rows per forward pass; the gradient stays the batch's

    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay: Literal["all", "matrices"] = "all"  # "matrices": biases and norms do not decay
    betas: tuple[Share, Share] = (0.9, 0.999)  # of AdamW
    fusion_lr: Annotated[float, Field(gt=0)] = 1.0  # times lr: a fusion student's fusion layers
    schedule: Literal["step", "cosine", "linear", "constant"] = "step"
    milestones: tuple[int, ...] = (10,)  # epochs after which "step" multiplies lr by gamma
    gamma: Annotated[float, Field(gt=0)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # linear from 0 to lr
    warmup_share: Share = 0.0  # of all steps, where warmup_steps is 0
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of the whole gradient

    targets: Literal["joined", "each"] = "joined"  # "each" only in older runs, which are read
    # what losses see: True unit rows; False those before L2 normalisation, of the teacher too where
    # the cache keeps them; "teacher" unit rows of the teacher alone
    normalise: Literal[True, False, "teacher"] = True
    center: Literal["auto"] | bool = "auto"  # see crosstill.train.centring
    # "ridge": least squares, see crosstill.train.ridge_heads; "auto": where towers are pretrained
    init_heads: Literal["auto", "random", "ridge"] = "auto"
    # the outputs of a frozen tower are computed once; "both" leaves the heads to learn
    freeze: Literal["none", "image", "text", "both"] = "none"
    dropout: bool = True  # of the towers while they learn, as much as they came with
    towers: Literal["frozen", "train"] = "frozen"  # of a fusion student
    negatives: Literal["hardest", "random", "batch"] = "hardest"  # of a score cache's candidates
    drawn: Positive | None = None  # candidates a step draws these from; None: all of them
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile the student

    teacher: str | None = None  # runs beside the student, for losses that read its layers
    train_split: str = "train"
    val_split: str = "val"
    seed: int = 0
    log_every: Positive = 10  # steps between lines of events.jsonl
    save_every: Positive = 500  # steps between checkpoints within an epoch
    keep: Annotated[int, Field(ge=2)] = 2  # checkpoints kept: a damaged one needs an older one

    @field_validator("losses", mode="before")
    @classmethod
    def _losses(cls, value: object) -> object:
        return _spelt_out("losses", value)

    @field_validator("losses")
    @classmethod
    def _some_loss(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not value:
            raise ValueError("a run needs at least one loss")
        return value

    @field_validator("balance", mode="before")
    @classmethod
    def _balance(cls, value: object) -> object:
        return _spelt_out("balance", value)

    def changed(self, changes: Sequence[str]) -> TrainConfig:
        """A copy with `key=value` changes applied; dots reach inside, values are TOML.

        Raises:
            ConfigError: the key does not exist (the nearest one is named) or the value is wrong.
        """
        values = self.model_dump()
        for change in changes:
            key, separator, text = change.partition("=")
            if not separator:
                raise ConfigError(f"--set {change}: write it as key=value")
            _assign(values, key.strip(), _parse(text.strip()))
        return parse(values)


def parse(values: Mapping[str, Any]) -> TrainConfig:
    """Check a whole configuration; the first thing wrong becomes one line."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise _unknown_key(key) from None
        raise ConfigError(f"{key} = {first['input']!r}: {first['msg']}") from None


def as_started(settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Spell out what the settings of an older run left to the defaults of its time.

    Args:
        settings: as its `config.json` has them.
        version: the format of that file.
    """
    if version >= 3:
        return dict(settings)
    started = {"center": False, **settings}
    if "hard_negative" in settings.get("losses", {}):
        losses = dict(settings["losses"])
        losses["hard_negative"] = {"margin": 0.0} | losses["hard_negative"]
        started["losses"] = losses
    return started


def _spelt_out(key: str, value: object) -> object:
    """Short ways of writing losses and balance: `a+b`, a list, `name = false`, a bare name."""
    if key == "balance":
        return {"name": value} if isinstance(value, str) else value
    if key != "losses":
        return value
    if isinstance(value, Mapping):
        return {k: {} if v is True else v for k, v in value.items() if v is not False}
    names = value.split("+") if isinstance(value, str) else value
    return {name: {} for name in names} if isinstance(names, Sequence) else names


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    head, *rest = key.split(".")
    if head not in TrainConfig.model_fields:
        raise _unknown_key(key)
    if not rest:
        values[head] = _spelt_out(head, value)
        return
    inner = values[head]
    for part in rest[:-1]:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}: {head} has nothing inside it to set")
    inner[rest[-1]] = value


def _parse(text: str) -> Any:
    """A TOML value, or the text itself, so that `schedule=cosine` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text in ("none", "None") else text


def _unknown_key(key: str) -> ConfigError:
    fields = TrainConfig.model_fields
    meant = did_you_mean(key.split(".")[0], fields)
    return ConfigError(f"unknown key {key!r}{meant} Known: {', '.join(fields)}")
