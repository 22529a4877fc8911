"""The tensors of a checkpoint, by name, whatever file or folder holds them.

Safetensors are read as they are. Pickled files (.ckpt, .pth, .pt, .bin) are read only when the
caller says so, and then by torch's restricted unpickler, which makes tensors and plain containers
and runs nothing that a file names. This is the one file of crosstill that reads pickles.
"""

import re
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crosstill.errors import CorruptError, ModelError
from crosstill.towers.hub import weight_files

Size = tuple[int, ...]
PICKLED = (".ckpt", ".pth", ".pt", ".bin")
_HOLDERS = ("state_dict", "model", "module")  # where trainers put the weights


class _Callback:
    """Stands for a trainer's callback, whose class is but a key in old Lightning files."""


# What Lightning and sacred write beside the tensors, and what is made of it instead. Not one of
# these runs code of the file or of a package: a namespace, a dict or a list is only filled.
_HARMLESS: list[Any] = [
    (Namespace, "argparse.Namespace"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "lightning.fabric.utilities.data.AttributeDict"),
    (dict, "sacred.config.custom_containers.ReadOnlyDict"),
    (list, "sacred.config.custom_containers.ReadOnlyList"),
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Callback, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
]


@dataclass(frozen=True)
class Findings:
    """How the names and shapes of a checkpoint compare with those of a model.

    Attributes:
        missing: parameters that the checkpoint lacks → the shape asked for.
        unexpected: tensors that nothing asks for → their shape.
        misshapen: tensors of another shape → theirs, and the one asked for.
        leftovers: reason → tensors that are known to be no part of the model.
    """

    missing: dict[str, Size] = field(default_factory=dict)
    unexpected: dict[str, Size] = field(default_factory=dict)
    misshapen: dict[str, tuple[Size, Size]] = field(default_factory=dict)
    leftovers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the checkpoint gives every parameter, and nothing that has no place."""
        return not (self.missing or self.unexpected or self.misshapen)

    def summary(self) -> str:
        """How many of each kind, and the first of them."""
        kinds: dict[str, Collection[str]] = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
        }
        return ", ".join(
            f"{len(names)} {kind} ({next(iter(names))})" for kind, names in kinds.items() if names
        )


def compare(
    wanted: Mapping[str, Size], given: Mapping[str, Tensor], leftovers: Mapping[str, str]
) -> Findings:
    """What fits of a checkpoint, and what does not.

    Args:
        wanted: the model's parameters, under the checkpoint's names, and their shapes.
        given: the checkpoint.
        leftovers: first letters of what it may hold beside the model → why that is not read.
    """
    findings = Findings(missing={n: shape for n, shape in wanted.items() if n not in given})
    for name, value in sorted(given.items()):
        shape = tuple(value.shape)
        if name in wanted:
            if shape != wanted[name]:
                findings.misshapen[name] = (shape, wanted[name])
            continue
        reason = next((why for start, why in leftovers.items() if name.startswith(start)), None)
        if reason is None:
            findings.unexpected[name] = shape
        else:
            findings.leftovers.setdefault(reason, []).append(name)
    return findings


def usual_size(tensors: Mapping[str, Tensor], pattern: str, axis: int, default: int) -> int:
    """The most frequent size along an axis of the tensors of a kind: one wrong is outvoted."""
    sizes = Counter(
        value.shape[axis]
        for name, value in tensors.items()
        if value.ndim > axis and value.shape[axis] and re.fullmatch(pattern, name)
    )
    return sizes.most_common(1)[0][0] if sizes else default


def count_layers(names: Iterable[str], pattern: str, default: int) -> int:
    """How many layers the names tell of; the pattern's first group is a layer's number."""
    return len({match[1] for name in names if (match := re.match(pattern, name))}) or default


def read(source: Path, unpickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, or of all weight files of a folder, on the CPU.

    Args:
        source: a .safetensors file, a pickled one, or a folder of either.
        unpickle: allow pickled files.

    Raises:
        ModelError: nothing there, a pickled file without `unpickle`, one that holds more than
            tensors and plain containers, or no tensors.
        CorruptError: a damaged safetensors file.
    """
    if source.is_dir():
        return {name: value for path in _weights(source) for name, value in _file(path, unpickle)}
    if not source.is_file():
        raise ModelError(f"{source}: no such file or folder; give a checkpoint")
    return dict(_file(source, unpickle))


def refuse_file(path: Path) -> None:
    """Say how a single file becomes the folder that a model is loaded from.

    Raises:
        ModelError: the path is a checkpoint's file.
    """
    if path.suffix not in (".safetensors", *PICKLED) or not path.is_file():
        return
    leave = "" if path.suffix == ".safetensors" else "--unpickle "
    raise ModelError(
        f"{path}: a single file; convert it once by `crosstill inspect {path} {leave}--out FOLDER "
        "--tokenizer PATH` (PATH is beit3.spm for BEiT-3, the folder of RoBERTa's tokenizer for "
        "METER) and give FOLDER"
    )


def _weights(folder: Path) -> list[Path]:
    paths = weight_files(folder)
    paths = paths or sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
    if not paths:
        raise ModelError(
            f"{folder}: no weights in it (.safetensors, {', '.join(PICKLED)}); give a checkpoint"
        )
    return paths


def _file(path: Path, unpickle: bool) -> Iterable[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path).items()
        except SafetensorError as error:
            raise CorruptError(
                f"{path}: not readable ({error}); restore it from a copy, or fetch it anew"
            ) from None
    if path.suffix not in PICKLED:
        raise ModelError(f"{path}: not a checkpoint (.safetensors, {', '.join(PICKLED)})")
    if not unpickle:
        raise ModelError(
            f"{path}: a pickled file, which could run code; allow it with --unpickle "
            "(unpickle=True in Python), which reads its tensors and nothing else"
        )
    return _tensors(_restricted(path), path).items()


def _restricted(path: Path) -> Any:
    """What the restricted unpickler makes of a file."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # torch's notes about a file that it then refuses
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, ... by damage
        raise ModelError(f"{path}: {_reason(str(error))}") from None


def _reason(text: str) -> str:
    global_name = re.search(r"GLOBAL (\S+)", text)
    if global_name:
        return (
            f"refused, because reading it would run {global_name[1]}; save its tensors alone as "
            ".safetensors where you trust it"
        )
    own = text.rpartition("WeightsUnpickler error:")[2].partition("\n\nCheck the doc")[0]
    line = " ".join(own.split())[:160]
    return f"not a file of tensors that torch reads safely ({line}); fetch or save it anew"


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors under the first known holder that has any, or of the file itself."""
    whole = content if isinstance(content, Mapping) else {}
    for inner in (*(whole.get(holder) for holder in _HOLDERS), whole):
        if isinstance(inner, Mapping):
            tensors = {
                name: value.detach()
                for name, value in inner.items()
                if isinstance(name, str) and isinstance(value, Tensor)
            }
            if tensors:
                return tensors
    raise ModelError(
        f"{path}: no tensors by name in it, bare or under {', '.join(_HOLDERS)}; give a state dict"
    )
