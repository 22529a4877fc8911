"""What a checkpoint holds, and whether it would load whole; and conversion to a folder of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from crosstill.errors import ConfigError, ModelError, unknown
from crosstill.progress import quiet
from crosstill.teachers import beit3, beit3_released, checkpoints, fusion
from crosstill.teachers.beit3_network import Network
from crosstill.teachers.checkpoints import Findings
from crosstill.teachers.meter import Meter, released
from crosstill.teachers.meter.visual import ClipVisual
from crosstill.towers import build, hub

FAMILIES = ("beit3", "meter")  # whose released files are known by their names
# what is told of a part's sizes, under the names of ClipVisual, transformers and Shape
_TOLD = (
    "model_type",
    "image_size",
    "patch_size",
    "layers",
    "num_hidden_layers",
    "width",
    "hidden_size",
    "heads",
    "num_attention_heads",
    "mlp",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, looked at.

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
        found = self.findings
        return {
            "family": self.family,
            "sizes": self.sizes,
            "parameters": self.parameters,
            "whole": found.whole,
            "missing": found.missing,
            "unexpected": found.unexpected,
            "misshapen": {
                name: {"found": shape, "wanted": wanted}
                for name, (shape, wanted) in found.misshapen.items()
            },
            "leftovers": found.leftovers,
        }

    def text(self) -> str:
        """The same for people."""
        return "\n".join(_lines(self))


def inspect(
    source: str, family: str | None = None, student: bool = False, unpickle: bool = False
) -> Inspection:
    """Look at a checkpoint, without loading what does not fit.

    Args:
        source: a file; a folder of a Hugging Face model, or one that `convert` wrote; a hub id.
        family: whose released names a file has; None finds out.
        student: of METER's, look at DCD's student.
        unpickle: allow pickled files, see `checkpoints.read`.

    Raises:
        ConfigError: no such family.
        ModelError: there is nothing there, or nothing that is known.
    """
    if family is not None and family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    path = _find(source)
    if (path / fusion.METER).is_file():
        model = Meter.load(path, torch.device("cpu"))
        return Inspection("meter", _sizes(model), model.parameters_by_part())
    if (path / "config.json").is_file():
        return _of_transformers(path)
    if beit3.is_beit3(path):
        return _of_beit3(beit3.load(path, torch.device("cpu")).network)
    tensors = checkpoints.read(path, unpickle)
    family = family or _family(tensors, source)
    _check_student(family, student)
    try:
        if family == "beit3":
            return _of_beit3(*beit3_released.examine(tensors))
        model, found = released.examine(tensors, student)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    return Inspection("meter", _sizes(model), model.parameters_by_part(), found)


def convert(
    source: str,
    folder: Path,
    tokenizer: Path,
    student: bool = False,
    unpickle: bool = False,
    image_size: int | None = None,
) -> None:
    """Write a released BEiT-3 or METER file as a folder that `teachers.load` reads.

    Args:
        source: the file.
        folder: where to write.
        tokenizer: of BEiT-3 its `beit3.spm`, of METER the folder of RoBERTa's tokenizer.
        student: of METER's, take DCD's student.
        unpickle: allow pickled files, see `checkpoints.read`.
        image_size: in pixels; positions are resized bicubically. None keeps the file's own.

    Raises:
        ConfigError: it is such a folder already, or the patches do not tile that size.
        ModelError: it does not load whole, or the tokenizer is another model's.
        InputError: the folder cannot be written to.
    """
    path = _find(source)
    if any((path / name).is_file() for name in (fusion.METER, beit3.RECORD, "config.json")):
        raise ConfigError(f"{source}: a folder that needs no conversion; give it as it is")
    tensors = checkpoints.read(path, unpickle)
    family = _family(tensors, source)
    _check_student(family, student)
    if family == "beit3":
        beit3_released.load(tensors, tokenizer, path.stem, image_size).save(folder)
    else:
        released.load(tensors, tokenizer, path.stem, student, image_size).save(folder)


def _family(tensors: Mapping[str, Tensor], source: str) -> str:
    """Whose released names these are."""
    if beit3_released.is_released(tensors):
        return "beit3"
    if released.is_released(tensors):
        return "meter"
    raise ModelError(
        f"{source}: {len(tensors)} tensors ({min(tensors)}, ...) of no known family; known "
        f"are the names of {', '.join(FAMILIES)}, and folders with a config.json"
    )


def _check_student(family: str, student: bool) -> None:
    if student and family != "meter":
        raise ConfigError(f"--student is for METER files, and this is {family}; leave it out")


def _find(source: str) -> Path:
    """A file, or the folder that holds the weights: of a run, that of its best."""
    if Path(source).is_file():
        return Path(source)
    folder = hub.locate(source)
    best = folder / "best"
    found = best if best.is_dir() and not list(folder.glob("*.safetensors")) else folder
    if (found / "student.json").is_file():
        raise ModelError(
            f"{source}: a crosstill student, which checks its own weights when it is opened; "
            "inspect is for checkpoints from elsewhere"
        )
    return found


def _of_transformers(folder: Path) -> Inspection:
    """A Hugging Face folder, as transformers itself reports what it missed and what was over."""
    config = hub.read_config(folder)
    held = {name: tuple(value.shape) for name, value in checkpoints.read(folder).items()}
    model, report = _loaded(folder, _architecture(config))
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = Findings(
        missing={name: wanted.get(name, ()) for name in sorted(report["missing_keys"])},
        unexpected={name: held.get(name, ()) for name in sorted(report["unexpected_keys"])},
        misshapen={
            name: (tuple(shape), tuple(asked))
            for name, shape, asked in sorted(report["mismatched_keys"])
        },
    )
    return Inspection(str(config.model_type), {}, {"total": model.num_parameters()}, found)


def _architecture(config: Any) -> Any:
    """The class that the config names, or the family's plain one."""
    kinds = (getattr(transformers, name, None) for name in config.architectures or ())
    models = (k for k in kinds if isinstance(k, type) and issubclass(k, PreTrainedModel))
    return next(models, transformers.AutoModel)


def _loaded(folder: Path, kind: Any) -> tuple[Any, dict[str, Any]]:
    """The model, with random values where the folder has none, and transformers' report."""
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


def _of_beit3(network: Network, found: Findings | None = None) -> Inspection:
    sizes = {"network": network.shape.to_json()}
    return Inspection("beit3", sizes, network.parameters_by_part(), found or Findings())


def _sizes(model: Meter) -> dict[str, dict[str, Any]]:
    """What decides a METER's shapes; a Hugging Face tower is called by its name."""
    image, text = model.image_tower, build.describe(model.text_tower.config)
    described = image.config if isinstance(image, ClipVisual) else build.describe(image.config)
    return {
        "image": {k: described[k] for k in _TOLD if k in described},
        "text": {k: text[k] for k in _TOLD if k in text},
        "fusion": {k: v for k, v in model.fusion.shape.to_json().items() if k in _TOLD},
    }


def _lines(found: Inspection) -> Iterator[str]:
    of = found.findings
    yield f"family      {found.family}"
    for part, sizes in found.sizes.items():
        told = ", ".join(f"{name} {value}" for name, value in sizes.items())
        yield f"{part:<12}{told}"
    yield "parameters  " + ", ".join(f"{part} {n:,}" for part, n in found.parameters.items())
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
