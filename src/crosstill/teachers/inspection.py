"""What a checkpoint holds, and whether it would load whole; and conversion to a folder of ours."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from crosstill.errors import ConfigError, ModelError, unknown
from crosstill.progress import quiet
from crosstill.teachers import checkpoints
from crosstill.teachers.checkpoints import Findings
from crosstill.towers import hub

# the modules that know a family's released files; METER's is found by name only, because models
# that read pairs are an annex. Each has RECORD, is_released, examine, load, read_folder and sizes.
_RELEASED = {
    "beit3": "crosstill.teachers.beit3_released",
    "meter": "crosstill.fusion.meter_released",
}
FAMILIES = tuple(_RELEASED)


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
    for name, module in _released_modules().items():
        if (path / module.RECORD).is_file():
            model = module.read_folder(path)
            return Inspection(name, module.sizes(model), model.parameters_by_part())
    if (path / "config.json").is_file():
        return _of_transformers(path)
    tensors = checkpoints.read(path, unpickle)
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
        unpickle: allow pickled files, see `checkpoints.read`.
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
    tensors = checkpoints.read(path, unpickle)
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
    """A file, or the folder that holds the weights: of a run, that of its best."""
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
    """A Hugging Face folder, as transformers itself reports what it missed and what was over."""
    config = hub.read_config(folder)
    shapes = {name: tuple(value.shape) for name, value in checkpoints.read(folder).items()}
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
