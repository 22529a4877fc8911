"""Folders of models: Hugging Face's, on disk or on the hub, and ours, sealed.

A source is a folder or a hub id, "owner/name" or "owner/name@revision". Whatever comes from the
hub is first brought to disk, so that everything else here reads folders. They are read without
pickle and without chatter. In a folder of ours nothing may be damaged:

    student.json             format, configuration, preprocess, licences; seals itself and holds
      or matcher.json        the SHA-256 of every other file
    model.safetensors        the weights
    tokenizer.json           the tokenizer, as transformers saves it
    tokenizer_config.json
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from crosstill import artefacts, files
from crosstill.errors import CorruptError, ModelError
from crosstill.progress import quiet

WEIGHTS = "model.safetensors"
_FORMAT = 1  # of a folder of ours
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_WANTED = (".json", ".txt", ".model", ".safetensors", "README.md")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # as transformers calls them
_PATIENCE = 10  # seconds until the hub counts as out of reach


def locate(source: str | Path) -> Path:
    """Find the folder of a source; a hub id is downloaded, or taken from the hub's cache offline.

    Raises:
        ModelError: no such folder, and the hub does not have it or cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.exists() or path.is_absolute() or not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise ModelError(f"{source}: no such folder; give a model's folder or a hub id")
    name, _, revision = text.partition("@")
    try:
        info = HfApi().model_info(name, revision=revision or None, timeout=_PATIENCE)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = (
            "its owner has to let you in" if isinstance(error, GatedRepoError) else "no such id"
        )
        raise ModelError(
            f"{source}: no such folder here, and the Hugging Face hub refuses it ({reason}); "
            "check the name, or log in with `hf auth login`"
        ) from None
    except Exception:  # no network: the client raises errors of several libraries
        return _from_hub_cache(name, revision)
    names = [file.rfilename for file in info.siblings or []]
    wanted = [n for n in names if "/" not in n and n.endswith(_WANTED)]
    if any(_WEIGHTS.fullmatch(n) for n in wanted):  # OpenCLIP's copy may lie beside them
        wanted = [n for n in wanted if not n.endswith(".safetensors") or _WEIGHTS.fullmatch(n)]
    with files.writing(Path(HF_HUB_CACHE)):
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))


def _from_hub_cache(name: str, revision: str) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except OSError:
        raise ModelError(
            f"{name}: no such folder here, and the Hugging Face hub cannot be reached; "
            "give a folder, or try again online"
        ) from None


@contextmanager
def reading(folder: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads into one line that names the folder."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ImportError, ...
        line = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(f"{folder}: its {what} does not load ({line})") from None


def architectures(folder: Path) -> list[str]:
    """List the classes of transformers that a folder's `config.json` names.

    A damaged `config.json` is no error here: whoever opens the folder next says what is wrong.
    """
    if not (folder / "config.json").is_file():
        return []
    try:
        config = files.read_json(folder / "config.json")
    except CorruptError:
        return []
    return list((config.get("architectures") if isinstance(config, dict) else None) or ())


def read_config(folder: Path) -> Any:
    """Read the folder's `config.json` as transformers' configuration object."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give the folder of a Hugging Face model")
    with reading(folder, "config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_model(
    folder: Path, config: Any, may_lack: tuple[str, ...] = (), kind: Any = AutoModel
) -> Any:
    """Read the folder's model in float32, in eval mode.

    Args:
        folder: where `config.json` and the safetensors lie.
        config: the configuration to build, which may ask for less than the folder holds.
        may_lack: first words of parameters that the caller will not use.
        kind: the class of transformers to read it with.

    Raises:
        ModelError: no safetensors, damaged ones, or parameters that they lack.
    """
    if not weight_files(folder):
        raise ModelError(
            f"{folder}: no .safetensors weights, and pickled ones are never read; convert them, "
            "or name a hub revision that has them (ID@REVISION)"
        )
    with reading(folder, "model"):
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    lacking = sorted(k for k in report["missing_keys"] if not k.startswith(may_lack or ("\0",)))
    if lacking:
        raise ModelError(
            f"{folder}: the weights lack {len(lacking)} parameters that its config.json asks for, "
            f"{lacking[0]} among them"
        )
    return model.eval()


def read_tokenizer(folder: Path, fast: bool = True) -> Any:
    """Read the folder's tokenizer.

    Args:
        folder: where its files lie.
        fast: whether it has to be one of the tokenizers library; SigLIP's runs on SentencePiece.

    Raises:
        ModelError: there is none. transformers would make up an empty one in some cases.
    """
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder}: no tokenizer (none of {', '.join(_TOKENIZERS)}); put the tokenizer's "
            "files beside the weights"
        )
    with reading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        if fast and not hasattr(tokenizer, "backend_tokenizer"):
            raise ModelError(f"{folder}: its tokenizer is not a fast one; save a tokenizer.json")
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """List the folder's safetensors by name: transformers' own, or else all."""
    paths = sorted(folder.glob("*.safetensors"))
    return [path for path in paths if _WEIGHTS.fullmatch(path.name)] or paths


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the weights' bytes, whatever the files are called."""
    digests = [files.digest_file(path) for path in weight_files(folder)]
    return digests[0] if len(digests) == 1 else files.digest_json(digests)


def display_name(source: str | Path) -> str:
    """Return the last part of a folder or hub id."""
    return os.path.basename(os.path.normpath(str(source))).partition("@")[0] or str(source)


class Saved(artefacts.Record):
    """The record of a saved model; what its kind adds is not looked at here."""

    files: artefacts.Digests


def save(
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
        # saved beside, then moved file by file: transformers does not write atomically
        with files.scratch(folder, "tokenizer") as beside, quiet():
            tokenizer.save_pretrained(beside)
            written = sorted(beside.iterdir())
            for path in written:
                files.write_bytes(folder / path.name, path.read_bytes())
        digests = artefacts.digests(folder, [WEIGHTS, *(path.name for path in written)])
        sealed = files.sealed({**record, "format": _FORMAT, "files": digests})
        files.write_json(folder / name, sealed)


def read_saved(
    folder: Path, name: str
) -> tuple[dict[str, Any], dict[str, Tensor], PreTrainedTokenizerFast]:
    """Read record, weights and tokenizer of a folder that `save` wrote, whose record is `name`.

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


def fitting(folder: Path, noun: str) -> AbstractContextManager[None]:
    """Turn what torch raises over weights of another model into one line that names the file."""
    complaint = f"not the weights of this {noun}"
    return artefacts.foreign(folder / WEIGHTS, complaint, "restore the folder from a copy")
