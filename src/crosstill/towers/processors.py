"""Hugging Face image processors as our own `Preprocess`.

A teacher whose processor a `Preprocess` cannot repeat is refused: `preprocess_from`. A student goes
on learning, so the processor of its image tower is brought as near as can be, and what differs is
a warning: `fit`. The processors of some families do what a `Preprocess` can say, only not key by
key: a crop given as a share, a second normalisation, blue before red.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor

from crosstill.errors import ModelError
from crosstill.images import Preprocess
from crosstill.progress import quiet
from crosstill.towers import hub

log = logging.getLogger(__name__)

_NEAREST, _BILINEAR = 0, 2  # Pillow's numbers
_FILTERS = {_BILINEAR: "bilinear", 3: "bicubic"}
_UNCROPPED = 384  # pixels, from which on ConvNeXt's processor crops nothing
_LEVIT = 224 / 256  # the share that LeViT's processor crops, whatever its record says
_REFUSED = {
    "include_top": "a second normalisation",
    "max_num_patches": "a varying number of patches (NaFlex; SigLIP 2 of a fixed size works)",
    "crop_pct": "a crop given as a share",
    "do_flip_channel_order": "BGR channels",
}


def read_preprocess(folder: Path) -> Preprocess:
    """Read a folder's image processor as a `Preprocess`.

    Raises:
        ModelError: there is none, or it does something that `Preprocess` cannot say.
    """
    if not any(
        (folder / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")
    ):
        raise ModelError(
            f"{folder}: no image processor (preprocessor_config.json); put it beside the weights"
        )
    with hub.reading(folder, "image processor"):
        processor = AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        return preprocess_from(processor.to_dict(), str(folder))


def preprocess_from(record: dict[str, Any], source: str) -> Preprocess:
    """Translate the record of an image processor (its `to_dict()`).

    Raises:
        ModelError: it does something that `Preprocess` cannot say; the message names it.
    """
    for key, meaning in _REFUSED.items():
        if record.get(key):
            raise _refusal(source, f"{meaning} ({key})")
    if not record.get("do_resize"):
        raise _refusal(source, "images of any size (do_resize is off)")
    interpolation = _FILTERS.get(record.get("resample", 3))
    if interpolation is None:
        raise _refusal(source, f"resample={record['resample']}")
    mean, std = _normalisation(record)
    geometry = _geometry(record, source)
    if record.get("do_pad") and not _pads_only_batches(record, geometry["size"]):
        raise _refusal(source, "padding (do_pad)")
    return Preprocess.from_json(
        {**geometry, "interpolation": interpolation, "mean": mean, "std": std}
    )


def _geometry(record: dict[str, Any], source: str) -> dict[str, Any]:
    size, crop = _sides(record.get("size")), _sides(record.get("crop_size"))
    crops = bool(record.get("do_center_crop"))
    if set(size) == {"height", "width"}:
        target = [size["height"], size["width"]]
        if not crops or crop == size:
            return {"size": target, "resize": "squash"}
        if set(crop) == {"height", "width"} and size["height"] == size["width"] >= max(
            crop.values()
        ):
            return _squashed(size["height"], [crop["height"], crop["width"]])
    elif set(size) == {"shortest_edge"} and record.get("size_divisor"):
        return _bounded(size["shortest_edge"], record["size_divisor"], crop if crops else {})
    elif set(size) == {"shortest_edge"} and crops and set(crop) == {"height", "width"}:
        target = [crop["height"], crop["width"]]
        if size["shortest_edge"] >= max(target):
            return {"size": target, "resize": "crop", "shorter": size["shortest_edge"]}
    raise _refusal(source, f"size={size} with crop_size={crop if crops else None}")


def _squashed(side: int, size: list[int]) -> dict[str, Any]:
    """ALIGN's resizing: squashed to a square, of which the centre is cut.

    With the longer side bounded by the shorter one, and both rounded to its multiples, every
    image becomes that square.
    """
    square = {"shorter": side, "longer": side, "multiple": side}
    return {**square, "resize": "crop", "size": size}


def _bounded(shorter: int, multiple: int, crop: dict[str, int]) -> dict[str, Any]:
    """ViLT's resizing: a bound for the longer side, then both rounded down; BridgeTower crops."""
    bounds = {"shorter": shorter, "longer": int(1333 / 800 * shorter), "multiple": multiple}
    if not crop:
        side = shorter // multiple * multiple
        return {**bounds, "resize": "fit", "size": [side, side]}
    edge = crop.get("shortest_edge")
    target = [crop.get("height", edge), crop.get("width", edge)]
    return {**bounds, "resize": "crop", "size": target}


def _pads_only_batches(record: dict[str, Any], size: list[int]) -> bool:
    """Tell whether only batches are padded: an image that comes alone is left as it is."""
    multiple = record.get("size_divisor")
    return bool(multiple and not record.get("pad_size") and not any(s % multiple for s in size))


def _sides(size: Any) -> dict[str, int]:
    """Sizes come as dicts, as objects that behave like them, or not at all."""
    return {k: int(v) for k, v in dict(size or {}).items() if v is not None}


def _normalisation(record: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Fold rescaling (x·f - offset) and normalising ((y - m) / s) into mean and std of x / 255."""
    factor = 255 * record.get("rescale_factor", 1 / 255) if record.get("do_rescale") else 255.0
    # 1/255 is stored rounded in some files; 1 keeps their mean and std as they are written.
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    offset = 1.0 if record.get("rescale_offset") else 0.0
    normalises = record.get("do_normalize")
    mean = record["image_mean"] if normalises else [0.0] * 3
    std = record["image_std"] if normalises else [1.0] * 3
    return [(m + offset) / factor for m in mean], [s / factor for s in std]


def _refusal(source: str, what: str) -> ModelError:
    return ModelError(
        f"{source}: its image processor asks for {what}, which crosstill cannot do; "
        "embed your images with it and give the vectors as a features folder"
    )


def check_size(folder: Path, preprocess: Preprocess, side: int) -> None:
    """Refuse an image processor whose images a vision model of that square size cannot take."""
    if preprocess.resize == "fit" or preprocess.size != (side, side):
        sizes = "many sizes" if preprocess.resize == "fit" else "{} x {}".format(*preprocess.size)
        raise ModelError(
            f"{folder}: its image processor gives images of {sizes}, and its vision model takes "
            f"{side} x {side}; put the processor that it was trained with beside the weights"
        )


def fit(folder: Path, tower: Any) -> Preprocess:
    """Fit a preprocess to a folder's tower, which takes red before blue from here on.

    Without an image processor, or with one that cannot be repeated, photos are squashed to the
    tower's `image_size` and scaled to -1..1, and a warning says so.
    """
    record = _read(folder)
    try:
        if record is None:
            raise ModelError(f"{folder}: no image processor that loads")
        preprocess = preprocess_from(plain(record), str(folder))
    except ModelError as error:
        preprocess = default(tower.config)
        reason, sides = str(error).partition(";")[0], " x ".join(map(str, preprocess.size))
        log.warning("%s: photos are squashed to %s and scaled to -1..1", reason, sides)
        return preprocess
    if record.get("resample") == _NEAREST:
        log.warning("%s: its nearest-pixel filter is replaced by a bilinear one", folder)
    if record.get("do_flip_channel_order"):
        swap_channels(tower)
    return preprocess


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Rewrite an image processor's record in the keys that `preprocess_from` knows.

    The order of the channels is not part of it: see `swap_channels`.
    """
    apart = ("do_flip_channel_order", "include_top", "crop_pct")
    plain_record = {key: value for key, value in record.items() if key not in apart}
    if plain_record.get("resample") == _NEAREST:
        plain_record["resample"] = _BILINEAR
    if record.get("include_top"):
        plain_record |= _normalised_twice(record)
    edge = dict(record.get("size") or {}).get("shortest_edge")
    share = record.get("crop_pct")
    if share and edge:
        plain_record |= _cropped(edge, share) if edge < _UNCROPPED else {"size": _square(edge)}
    elif edge and record.get("image_processor_type") == "LevitImageProcessor":
        plain_record["size"] = {"shortest_edge": int(edge / _LEVIT)}
    return plain_record


def swap_channels(tower: nn.Module) -> None:
    """Flip the first convolution of a tower that was trained on BGR, so that it reads RGB."""
    first = next(m for m in tower.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))


def default(config: Any) -> Preprocess:
    """Make a preprocess that squashes to the tower's `image_size`, or to 224 pixels."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocess(size=(int(height), int(width)))


def _read(folder: Path) -> dict[str, Any] | None:
    """Read the record of the folder's image processor; None where there is none that loads."""
    try:
        with quiet():
            reader = AutoImageProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception:  # OSError, ValueError, ImportError, ... by what is in the folder
        return None
    return dict(reader.to_dict())


def _normalised_twice(record: dict[str, Any]) -> dict[str, Any]:
    """EfficientNet's last step divides by the standard deviation once more."""
    std = record["image_std"]
    if not record.get("do_normalize"):
        return {"do_normalize": True, "image_mean": [0.0] * 3, "image_std": std}
    return {"image_std": [s * s for s in std]}


def _cropped(edge: int, share: float) -> dict[str, Any]:
    """ConvNeXt's resizing below 384 pixels: the crop is that share of the shorter side."""
    shorter = {"shortest_edge": int(edge / share)}
    return {"size": shorter, "crop_size": _square(edge), "do_center_crop": True}


def _square(edge: int) -> dict[str, int]:
    return {"height": edge, "width": edge}
