"""What a Hugging Face image processor does, said as our own `Preprocess`."""

from __future__ import annotations

from typing import Any

from crosstill.errors import ModelError
from crosstill.images import Preprocess

_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_REFUSED = {
    "include_top": "a second normalisation",
    "max_num_patches": "a varying number of patches (NaFlex; SigLIP 2 of a fixed size works)",
    "crop_pct": "a crop given as a share",
    "do_flip_channel_order": "BGR channels",
}


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
    """Whether an image that comes alone is left as it is; a batch's padding lies under a mask."""
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
