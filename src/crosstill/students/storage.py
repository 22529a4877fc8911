"""A student's folder: what is in it, and that nothing in it was damaged.

student.json             format, configuration, preprocess, licences; seals itself and
                         holds the SHA-256 of every other file
model.safetensors        the weights
tokenizer.json           the tokenizer, as transformers saves it
tokenizer_config.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from crosstill import files
from crosstill.errors import CorruptError, ModelError
from crosstill.students import vocabulary
from crosstill.teachers.hugging_face import quiet

RECORD, WEIGHTS = "student.json", "model.safetensors"
_FORMAT = 1


def write(
    folder: Path,
    record: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write a student; the record comes last, so that a folder with one is complete.

    Raises:
        InputError: the folder cannot be written to.
    """
    files.writable_folder(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    files.write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path))
    names = [WEIGHTS, *_write_tokenizer(folder, tokenizer)]
    digests = {name: files.digest_file(folder / name) for name in names}
    sealed = files.sealed({**record, "format": _FORMAT, "files": digests})
    files.write_json(folder / RECORD, sealed)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], PreTrainedTokenizerFast]:
    """Record, weights and tokenizer of a folder.

    Raises:
        ModelError: it holds no student.
        CorruptError: one of its files was damaged; it is named.
    """
    if not (folder / RECORD).is_file():
        raise ModelError(f"{folder}: no {RECORD}; give a folder in which a student was saved")
    record = files.read_sealed(folder / RECORD, {_FORMAT})
    for name, digest in record["files"].items():
        files.check_digest(folder / name, digest)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CorruptError(f"{folder / WEIGHTS}: not readable ({error}); rebuild it") from None
    with quiet():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return record, weights, vocabulary.plain(tokenizer)


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Save beside, then move file by file: transformers does not write atomically."""
    with tempfile.TemporaryDirectory() as beside, quiet():
        tokenizer.save_pretrained(beside)
        written = sorted(Path(beside).iterdir())
        for path in written:
            files.write_bytes(folder / path.name, path.read_bytes())
    return [path.name for path in written]
