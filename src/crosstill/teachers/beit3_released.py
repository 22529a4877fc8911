"""BEiT-3's released checkpoints: what a file holds, what does not fit, and how it is loaded.

Known are the layouts of the public retrieval and contrastive (`itc`) files. Sizes are read from
the tensors, so that a small model under the same names loads as the released ones do.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstill.errors import ConfigError, ModelError
from crosstill.teachers import beit3
from crosstill.teachers.beit3 import RECORD, SIZES, Beit3, Network, Shape
from crosstill.teachers.checkpoints import Findings, compare, count_layers, usual_size
from crosstill.towers.tower_parts import grid_of, resized_positions

__all__ = ["RECORD", "examine", "is_released", "load", "read_folder", "sizes"]

HEAD = 64  # width of an attention head, but for the giant's
_HEADS = ("language_head.weight", "vision_head.weight")
_PLACES = "beit3.encoder.embed_positions.A.weight"
# first letters of what a file may hold beside the model → why it is not read
LEFTOVERS = {
    "mim_head.": "the masked-image head of pretraining",
    "mlm_head.": "the masked-word head of pretraining",
}


def is_released(names: Iterable[str]) -> bool:
    """Tell whether these are BEiT-3's parameter names."""
    return any(name.startswith("beit3.") for name in names)


def examine(tensors: Mapping[str, Tensor]) -> tuple[Network, Findings]:
    """Compare a released state dict with the model that its sizes describe.

    Args:
        tensors: the file's, under its names; only their shapes are looked at.

    Returns:
        that model on the meta device, and what does not fit.

    Raises:
        ModelError: these are not BEiT-3's names, a retrieval head is missing, or no model has
            such sizes.
    """
    if not is_released(tensors):
        raise ModelError("no tensor named beit3.*: not a BEiT-3 checkpoint")
    lacking = [name for name in _HEADS if name not in tensors]
    if lacking:
        raise ModelError(
            f"no {' and no '.join(lacking)}, so it has no joint space: a file of pretraining or "
            "of another task; take a retrieval or an itc file"
        )
    network = _on_meta(_shape(tensors))
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    return network, compare(wanted, tensors, LEFTOVERS)


def load(
    tensors: Mapping[str, Tensor], tokenizer: Path, name: str, image_size: int | None = None
) -> Beit3:
    """Make a teacher of a released state dict, in float32.

    Args:
        tensors: the file's, under its names, of any float type; they are copied.
        tokenizer: the SentencePiece model, `beit3.spm`.
        name: what to call it in tables.
        image_size: in pixels, of the images; None keeps the file's own.

    Raises:
        ModelError: something is missing, unexpected or of another shape; or the tokenizer is not
            there, no SentencePiece model, or another model's.
        ConfigError: the patches do not tile images of that size, or sentencepiece is missing.
    """
    network, findings = examine(tensors)
    if not findings.whole:
        raise ModelError(f"{name}: {findings.summary()}; list them with `crosstill inspect`")
    if not tokenizer.is_file():
        raise ModelError(f"{tokenizer}: no such file; give the beit3.spm of the checkpoints")
    state = {n: tensors[n].to("cpu", torch.float32, copy=True) for n in network.state_dict()}
    if image_size is not None:
        grid = grid_of(image_size, network.shape.patch)
        network = _on_meta(replace(network.shape, image_size=image_size))
        table = state[_PLACES]  # in front of the class token are two rows that are never read
        state[_PLACES] = torch.cat([table[:2], resized_positions(table[2:], grid)])
    network.load_state_dict({n: value.contiguous() for n, value in state.items()}, assign=True)
    return Beit3(network, tokenizer.read_bytes(), name, torch.device("cpu"), str(tokenizer))


def read_folder(folder: Path) -> Network:
    """Load the network of a folder that was converted before."""
    return beit3.load(folder, device=torch.device("cpu")).network


def sizes(network: Network) -> dict[str, dict[str, Any]]:
    """Return what decides the shapes of the network, by part."""
    return {"network": network.shape.to_json()}


def _on_meta(shape: Shape) -> Network:
    with torch.device("meta"):
        return Network(shape)


def _shape(tensors: Mapping[str, Tensor]) -> Shape:
    layers = r"beit3\.encoder\.layers\.(\d{1,4})\."
    usual = SIZES["base"]
    width = usual_size(tensors, rf"{layers}\w+_norm\.[AB]\.(weight|bias)", 0, usual.width)
    patch = usual_size(tensors, r"beit3\.vision_embed\.proj\.weight", 3, usual.patch)
    rows = usual_size(tensors, r"beit3\.encoder\.embed_positions\.A\.weight", 0, 199)
    try:
        return Shape(
            width=width,
            layers=count_layers(tensors, layers, usual.layers),
            heads=_heads(width),
            mlp=usual_size(tensors, rf"{layers}ffn\.[AB]\.fc1\.(weight|bias)", 0, usual.mlp),
            patch=patch,
            image_size=math.isqrt(max(rows - 3, 0)) * patch,
            words=usual_size(tensors, r"beit3\.text_embed\.weight", 0, usual.words),
            places=usual_size(tensors, r"beit3\.encoder\.embed_positions\.B\.weight", 0, 1024),
        )
    except ConfigError as error:
        raise ModelError(f"the tensors' shapes make no BEiT-3 ({error})") from None


def _heads(width: int) -> int:
    known = {size.width: size.heads for size in SIZES.values()}
    if width not in known and width % HEAD:
        raise ConfigError(f"width {width} is not a multiple of {HEAD}")
    return known.get(width, width // HEAD)
