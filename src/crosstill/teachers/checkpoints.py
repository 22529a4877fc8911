"""Checkpoints from elsewhere: what they hold, whether they load whole, and conversion to folders.

Safetensors are read as they are. Pickled files (.ckpt, .pth, .pt, .bin) are read only when the
caller says so, and then by torch's restricted unpickler, which makes tensors and plain containers
and runs nothing that a file names. This is the one file of crosstill that reads pickles.
"""

import re
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from crosstill.errors import ConfigError, CorruptError, ModelError, unknown
from crosstill.progress import quiet
from crosstill.towers import hub

Size = tuple[int, ...]
PICKLED = (".ckpt", ".pth", ".pt", ".bin")
_HOLDERS = ("state_dict", "model", "module")  # where trainers put the weights

# the modules that know a family's released files; METER's is found by name only, because models
# that read pairs are an annex. Each has RECORD, is_released, examine, load, read_folder and sizes.
_RELEASED = {
    "beit3": "crosstill.teachers.beit3_released",
    "meter": "crosstill.fusion.meter_released",
}
FAMILIES = tuple(_RELEASED)


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
    """The differences of a checkpoint's names and shapes from those of a model.

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
        """Count each kind, and name the first of it."""
        kinds: dict[str, Collection[str]] = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
        }
        return ", ".join(
            f"{len(names)} {kind} ({next(iter(names))})" for kind, names in kinds.items() if names
        )


@dataclass(frozen=True)
class Inspection:
    """The contents of a checkpoint, compared with the model that they make.

    Attributes:
        family: "beit3", "meter", or transformers' name of the architecture.
        sizes: part → what decides its shapes, where known.
        parameters: how many there are, by part and in all.
        findings: what does not fit.
    """

    family: str
    sizes: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    findings: Findings = field(default_factory=Findings)

    def to_json(self) -> dict[str, Any]:
        findings = self.findings
        return {
            "family": self.family,
            "sizes": self.sizes,
            "parameters": self.parameters,
            "whole": findings.whole,
            "missing": findings.missing,
            "unexpected": findings.unexpected,
            "misshapen": {
                name: {"found": shape, "wanted": wanted}
                for name, (shape, wanted) in findings.misshapen.items()
            },
            "leftovers": findings.leftovers,
        }

    def text(self) -> str:
        """Write the inspection for people, line by line."""
        return "\n".join(_lines(self))


def inspect(
    source: str, family: str | None = None, student: bool = False, unpickle: bool = False
) -> Inspection:
    """Inspect a checkpoint, without loading what does not fit.

    Args:
        source: a file; a folder of a Hugging Face model, or one that `convert` wrote; a hub id.
        family: whose released names a file has; None finds out.
        student: of METER's, look at DCD's student.
        unpickle: allow pickled files, see `read`.

    Raises:
        ConfigError: no such family.
        ModelError: there is nothing there, or nothing that is known.
    """
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    path = _find(source)
    for name, module in _released_modules().items():
        if (path / module.RECORD).is_file():
            model = module.read_folder(path)
            return Inspection(name, module.sizes(model), model.parameters_by_part())
    if (path / "config.json").is_file():
        return _of_transformers(path)
    tensors = read(path, unpickle)
    family = family or _family(tensors, source)
    released = _released_modules()[family]
    try:
        model, findings = released.examine(tensors, **_options(family, student))
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    return Inspection(family, released.sizes(model), model.parameters_by_part(), findings)


def convert(
    source: str,
    folder: Path,
    tokenizer: Path,
    student: bool = False,
    unpickle: bool = False,
    image_size: int | None = None,
) -> None:
    """Write a released BEiT-3 or METER file as a folder that `crosstill.open_model` opens.

    Args:
        source: the file.
        folder: where to write.
        tokenizer: of BEiT-3 its `beit3.spm`, of METER the folder of RoBERTa's tokenizer.
        student: of METER's, take DCD's student.
        unpickle: allow pickled files, see `read`.
        image_size: in pixels; positions are resized bicubically. None keeps the file's own.

    Raises:
        ConfigError: it is such a folder already, or the patches do not tile that size.
        ModelError: it does not load whole, or the tokenizer is another model's.
        InputError: the folder cannot be written to.
    """
    path = _find(source)
    records = [module.RECORD for module in _released_modules().values()]
    if any((path / name).is_file() for name in (*records, "config.json")):
        raise ConfigError(f"{source}: a folder that needs no conversion; give it as it is")
    tensors = read(path, unpickle)
    family = _family(tensors, source)
    options = _options(family, student)
    released = _released_modules()[family]
    released.load(tensors, tokenizer, path.stem, image_size=image_size, **options).save(folder)


def _family(tensors: Mapping[str, Tensor], source: str) -> str:
    """Find the family whose released names these are."""
    for name, module in _released_modules().items():
        if module.is_released(tensors):
            return name
    raise ModelError(
        f"{source}: {len(tensors)} tensors ({min(tensors)}, ...) of no known family; known "
        f"are the names of {', '.join(FAMILIES)}, and folders with a config.json"
    )


def _options(family: str, student: bool) -> dict[str, bool]:
    """Return what a family's module takes beside the tensors; only METER's files hold a student."""
    if student and family != "meter":
        raise ConfigError(f"--student is for METER files, and this is {family}; leave it out")
    return {"student": True} if student else {}


def _released_modules() -> dict[str, Any]:
    """Import the modules that know released files, by the family's name."""
    return {family: import_module(module) for family, module in _RELEASED.items()}


def _find(source: str) -> Path:
    """Find a file, or the folder that holds the weights: of a run, its best."""
    if Path(source).is_file():
        return Path(source)
    folder = hub.locate(source)
    best = folder / "best"
    place = best if best.is_dir() and not list(folder.glob("*.safetensors")) else folder
    if (place / "student.json").is_file():
        raise ModelError(
            f"{source}: a crosstill student, which checks its own weights when it is opened; "
            "inspect is for checkpoints from elsewhere"
        )
    return place


def _of_transformers(folder: Path) -> Inspection:
    """Inspect a Hugging Face folder by the report of transformers on loading it."""
    config = hub.read_config(folder)
    shapes = {name: tuple(value.shape) for name, value in read(folder).items()}
    model, report = _loaded(folder, _architecture(config))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    findings = Findings(
        missing={name: wanted.get(name, ()) for name in sorted(report["missing_keys"])},
        unexpected={name: shapes.get(name, ()) for name in sorted(report["unexpected_keys"])},
        misshapen={
            name: (tuple(shape), tuple(expected))
            for name, shape, expected in sorted(report["mismatched_keys"])
        },
    )
    return Inspection(str(config.model_type), {}, {"total": model.num_parameters()}, findings)


def _architecture(config: Any) -> Any:
    """Find the class that the config names, or the family's plain one."""
    kinds = (getattr(transformers, name, None) for name in config.architectures or ())
    models = (k for k in kinds if isinstance(k, type) and issubclass(k, PreTrainedModel))
    return next(models, transformers.AutoModel)


def _loaded(folder: Path, kind: Any) -> tuple[Any, dict[str, Any]]:
    """Load the model, random where the folder has no values, and transformers' report."""
    try:
        with quiet(), torch.random.fork_rng():
            return kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ... by model
        line = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(f"{folder}: does not load ({line})") from None


def _lines(inspection: Inspection) -> Iterator[str]:
    of = inspection.findings
    yield f"family      {inspection.family}"
    for part, sizes in inspection.sizes.items():
        line = ", ".join(f"{name} {value}" for name, value in sizes.items())
        yield f"{part:<12}{line}"
    yield "parameters  " + ", ".join(f"{part} {n:,}" for part, n in inspection.parameters.items())
    yield f"missing     {len(of.missing)}"
    yield from (f"    {name} {list(shape)}" for name, shape in of.missing.items())
    yield f"unexpected  {len(of.unexpected)}"
    yield from (f"    {name} {list(shape)}" for name, shape in of.unexpected.items())
    yield f"misshapen   {len(of.misshapen)}"
    for name, (shape, wanted) in of.misshapen.items():
        yield f"    {name} {list(shape)}, asked for {list(wanted)}"
    yield f"left out    {sum(map(len, of.leftovers.values()))}"
    yield from (f"    {len(names)}: {reason}" for reason, names in of.leftovers.items())
    yield "loads whole" if of.whole else "does not load whole"


def compare(
    wanted: Mapping[str, Size], given: Mapping[str, Tensor], leftovers: Mapping[str, str]
) -> Findings:
    """Compare the names and shapes of a checkpoint with those of a model.

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
    """Find the most frequent size along an axis of tensors of a kind: one wrong is outvoted."""
    sizes = Counter(
        value.shape[axis]
        for name, value in tensors.items()
        if value.ndim > axis and value.shape[axis] and re.fullmatch(pattern, name)
    )
    return sizes.most_common(1)[0][0] if sizes else default


def count_layers(names: Iterable[str], pattern: str, default: int) -> int:
    """Count the layers in the names; the pattern's first group is a layer's number."""
    return len({match[1] for name in names if (match := re.match(pattern, name))}) or default


def read(source: Path, unpickle: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a file, or of all weight files of a folder, on the CPU.

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
    paths = hub.weight_files(folder)
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
    """Read a pickled file with torch's restricted unpickler."""
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
    """Find the tensors under the first known holder that has any, or in the file itself."""
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
