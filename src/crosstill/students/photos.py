"""How a pretrained image tower wants its photos.

The processors of some families do what a `Preprocess` can say, only not key by key: a crop given
as a share, a second normalisation, blue before red. A teacher whose processor cannot be repeated
is refused; a student goes on learning, so it begins with a stand-in, and a warning says so.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor

from crosstill.errors import ModelError
from crosstill.images import Preprocess
from crosstill.teachers import hugging_face
from crosstill.teachers.processors import preprocess_from

log = logging.getLogger(__name__)

_NEAREST, _BILINEAR = 0, 2  # Pillow's numbers
_UNCROPPED = 384  # pixels, from which on ConvNeXt's processor crops nothing
_LEVIT = 224 / 256  # the share that LeViT's processor crops, whatever its record says


def fit(folder: Path, tower: Any) -> Preprocess:
    """The preprocess of a folder's tower, which takes red before blue from here on.

    Without an image processor, or with one that cannot be repeated, photos are squashed to the
    tower's `image_size` and scaled to -1..1, and a warning says so.
    """
    record = _read(folder)
    try:
        if record is None:
            raise ModelError(f"{folder}: no image processor that loads")
        found = preprocess_from(plain(record), str(folder))
    except ModelError as error:
        found = default(tower.config)
        reason, sides = str(error).partition(";")[0], " x ".join(map(str, found.size))
        log.warning("%s: photos are squashed to %s and scaled to -1..1", reason, sides)
        return found
    if record.get("resample") == _NEAREST:
        log.warning("%s: its nearest-pixel filter is replaced by a bilinear one", folder)
    if record.get("do_flip_channel_order"):
        swap_channels(tower)
    return found


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """An image processor's record without the words that `preprocess_from` does not know.

    The order of the channels is not part of it: see `swap_channels`.
    """
    apart = ("do_flip_channel_order", "include_top", "crop_pct")
    said = {key: value for key, value in record.items() if key not in apart}
    if said.get("resample") == _NEAREST:
        said["resample"] = _BILINEAR
    if record.get("include_top"):
        said |= _normalised_twice(record)
    edge = dict(record.get("size") or {}).get("shortest_edge")
    share = record.get("crop_pct")
    if share and edge:
        said |= _cropped(edge, share) if edge < _UNCROPPED else {"size": _square(edge)}
    elif edge and record.get("image_processor_type") == "LevitImageProcessor":
        said["size"] = {"shortest_edge": int(edge / _LEVIT)}
    return said


def swap_channels(tower: nn.Module) -> None:
    """Make a tower that was trained on BGR read RGB: its first convolution takes them in turn."""
    first = next(m for m in tower.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))


def default(config: Any) -> Preprocess:
    """Squashed to the tower's `image_size`, or to 224 pixels, and scaled to -1..1."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocess(size=(int(height), int(width)))


def _read(folder: Path) -> dict[str, Any] | None:
    """The record of the folder's image processor; None where there is none that loads."""
    try:
        with hugging_face.quiet():
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
