"""The folder of a model that is ours: what is in it, and that nothing in it was damaged.

student.json             format, configuration, preprocess, licences; seals itself and holds the
  or matcher.json        SHA-256 of every other file
model.safetensors        the weights
tokenizer.json           the tokenizer, as transformers saves it
tokenizer_config.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosstill import artefacts, files
from crosstill.errors import CorruptError, ModelError
from crosstill.progress import quiet

WEIGHTS = "model.safetensors"
_FORMAT = 1


class Saved(artefacts.Record):
    """What the records of all models say."""

    files: artefacts.Digests


def write(
    folder: Path,
    name: str,
    record: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write a model; its record, `name`, comes last: a folder with one is complete.

    Raises:
        InputError: the folder cannot be written to.
    """
    files.writable_folder(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    size = sum(value.nbytes for value in tensors.values())
    with files.writing(folder, size):
        files.write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path), size)
        names = [WEIGHTS, *_write_tokenizer(folder, tokenizer)]
        digests = artefacts.digests(folder, names)
        sealed = files.sealed({**record, "format": _FORMAT, "files": digests})
        files.write_json(folder / name, sealed)


def read(
    folder: Path, name: str
) -> tuple[dict[str, Any], dict[str, Tensor], PreTrainedTokenizerFast]:
    """Record, weights and tokenizer of a folder whose record is `name`.

    Raises:
        ModelError: it holds no such model.
        CorruptError: one of its files was damaged; it is named.
    """
    if not (folder / name).is_file():
        raise ModelError(f"{folder}: no {name}; give a folder in which such a model was saved")
    record = artefacts.read(folder / name, Saved, {_FORMAT})
    artefacts.check_files(folder, {WEIGHTS: "", **record.files})
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CorruptError(f"{folder / WEIGHTS}: not readable ({error}); rebuild it") from None
    with quiet(), artefacts.foreign(folder / "tokenizer.json", "not a tokenizer"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return record.model_dump(), weights, tokenizer


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Save beside, then move file by file: transformers does not write atomically."""
    with files.scratch(folder, "tokenizer") as beside, quiet():
        tokenizer.save_pretrained(beside)
        written = sorted(beside.iterdir())
        for path in written:
            files.write_bytes(folder / path.name, path.read_bytes())
    return [path.name for path in written]
