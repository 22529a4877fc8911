"""How a model wants its images: sizes, filter, normalisation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from dataclasses import fields as _fields
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from crosstill import files
from crosstill.errors import ConfigError, unknown

MAX_SIDE = 4096  # pixels of what a model takes
_RULES = 1  # raise it when the same bytes give other pixels: it is part of every digest
_LATER = {"longer": None, "multiple": 1}  # came after the first caches: said only where they count


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images.

    Attributes:
        size: height and width, in pixels, of what the model takes; with "fit", of a square image,
            and of views.
        resize: "squash" goes straight to `size`; "crop" brings the shorter side to `shorter`
            and cuts `size` from the centre, as CLIP does; "fit" brings the shorter side to
            `shorter` and cuts nothing, as ViLT does, so that images differ in size.
        shorter: pixels, for "crop" and "fit"; None means the longer one of `size`.
        interpolation: the antialiased filter.
        mean, std: per channel, of pixels in 0..1.
        longer: pixels, for "crop" and "fit": the image is made smaller yet where its longer side
            would pass this; None sets no bound.
        multiple: pixels, for "crop" and "fit": both sides are rounded down to multiples of it.

    Raises:
        ConfigError: a value that cannot work.
    """

    size: tuple[int, int] = (224, 224)
    resize: Literal["squash", "crop", "fit"] = "squash"
    shorter: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    longer: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        least = self.shorter or max(self.size, default=0)
        squashes = self.resize == "squash"
        fits = {
            "size": len(self.size) == 2 and 0 < min(self.size) <= max(self.size) <= MAX_SIDE,
            "resize": self.resize in ("squash", "crop", "fit"),
            "shorter": self.shorter is None or self.shorter >= max(self.size),
            "interpolation": self.interpolation in ("bicubic", "bilinear"),
            "mean": len(self.mean) == 3,
            "std": len(self.std) == 3 and min(self.std) > 0,
            "longer": self.longer is None or (not squashes and self.longer >= least),
            "multiple": self.multiple == 1 or (not squashes and 1 < self.multiple <= least),
        }
        for name in (name for name, fit in fits.items() if not fit):
            raise ConfigError(f"preprocess {name}: {getattr(self, name)!r} is not possible")

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of that size is resized to, before anything is cut."""
        if self.resize == "squash":
            return self.size
        shorter, least = self.shorter or max(self.size), min(height, width)
        if self.resize == "crop" and self.longer is None and self.multiple == 1:
            return shorter * height // least, shorter * width // least
        # The order of these steps is that of ViLT's processor, to the last bit.
        tall, wide = (
            float(shorter) if side == least else shorter / least * side for side in (height, width)
        )
        scale = min(1.0, (self.longer or max(tall, wide)) / max(tall, wide))
        return self._rounded(tall * scale), self._rounded(wide * scale)

    def _rounded(self, side: float) -> int:
        return max(self.multiple, int(side + 0.5) // self.multiple * self.multiple)

    def to_json(self) -> dict[str, Any]:
        record = json.loads(json.dumps(asdict(self)))
        return {k: v for k, v in record.items() if k not in _LATER or v != _LATER[k]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json`; keys that are absent take their defaults."""
        for key in value.keys() - cls.__dataclass_fields__.keys():
            raise unknown("preprocess key", key, cls.__dataclass_fields__)
        plain: dict[str, Any] = {k: tuple(v) if type(v) is list else v for k, v in value.items()}
        try:
            _types().model_validate(plain)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ConfigError(
                f"preprocess {first['loc'][0]}: {first['msg']}; export or save the model anew"
            ) from None
        return cls(**plain)  # not what was validated, in which 0 has become 0.0

    def digest(self) -> str:
        """SHA-256 of all that decides the pixels, the rules of `images` included."""
        return files.digest_json({"rules": _RULES, **self.to_json()})


@cache
def _types() -> type[BaseModel]:
    """Return a model of the types of all fields, none of which is converted."""
    hints = get_type_hints(Preprocess)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in _fields(Preprocess)
    }
    return create_model("Types", __config__=ConfigDict(strict=True), **fields)
