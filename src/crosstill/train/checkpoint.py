"""Stop a run after a step, and keep all that it needs to go on as if it had never stopped.

A checkpoint is one safetensors file and a sealed JSON beside it with the file's SHA-256, written
in that order: a checkpoint without its JSON does not count. Nothing is pickled. Ctrl-C and SIGTERM
end a run after the step in hand, with a checkpoint.
"""

import json
import logging
import os
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosstill import artefacts, files
from crosstill.errors import CorruptError

log = logging.getLogger(__name__)

FORMAT = 2  # 1 had no names
Count = Annotated[int, Field(ge=0)]

STEP = "step-" + 9 * "[0-9]"  # of file names, as a pattern

# What must be in a checkpoint; `load` refuses one that lacks any of it.
PIECES = (
    "student",
    "optimizer",
    "losses",  # queues and their pointers
    "balance",
    "names",  # of the losses and of all that learns, in the order of the others' rows; whose it is
    "position",  # epoch, step within it, steps so far
    "best",
    "rng_torch",
    "rng_cuda",
    "rng_numpy",
    "rng_python",
)


class _Record(artefacts.Record):
    format: int
    data_sha256: artefacts.Sha256


class _Position(artefacts.Record):
    epoch: Count
    step: Count
    total: Count


class Best(artefacts.Record):
    """A run's best epoch and its figure, RSUM or agreement with the teacher."""

    epoch: int | None
    rsum: float | None = None
    agreement: float | None = None

    @model_validator(mode="after")
    def _some_figure(self) -> Self:
        if self.rsum is None and self.agreement is None:
            raise ValueError("neither rsum nor agreement")
        return self


class _Numbers(artefacts.Record):
    """The pieces that the loop itself counts with."""

    position: _Position
    best: Best


State = dict[str, Any]  # piece → nested dicts and lists of tensors and JSON values


def save(folder: Path, step: int, state: State, keep: int) -> None:
    """Write the checkpoint of a step, then drop all but the newest `keep`."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    path = folder / f"{_name(step)}.safetensors"
    metadata = {"state": json.dumps(tree)}
    size = sum(value.nbytes for value in tensors.values())
    files.write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata), size)
    record = {"format": FORMAT, "file": path.name, "data_sha256": files.digest_file(path)}
    files.write_json(path.with_suffix(".json"), files.sealed(record))
    tidy(folder, step, keep)


def tidy(folder: Path, step: int, keep: int) -> None:
    """Leave the checkpoint of a step, which is whole, and the `keep` - 1 before it.

    Later ones were found damaged, and there may be a part of one that a kill left.
    """
    files.sweep(folder)
    records = _records(folder)
    upto = [record for record in records if record.stem <= _name(step)]
    for record in {*records} - {*upto[-keep:]}:
        record.unlink()
    for path in folder.glob(f"{STEP}.safetensors"):
        if not path.with_suffix(".json").is_file():
            path.unlink()


def load_latest(folder: Path) -> State | None:
    """Load the newest checkpoint that is whole; None if none was ever finished.

    A damaged one is named in the log and the one before it is used.

    Raises:
        CorruptError: there are checkpoints and every one is damaged.
    """
    records = _records(folder)[::-1]
    for record in records:
        try:
            return load(record)
        except CorruptError as error:
            before = "; going back to the checkpoint before it" if record != records[-1] else ""
            log.warning("%s%s", error, before)
    if records:
        raise CorruptError(f"{folder}: every checkpoint is damaged; start the run anew")
    return None


def load(record: Path) -> State:
    """Load the state behind one checkpoint's JSON, each of `PIECES` present."""
    path = record.with_suffix(".safetensors")
    about = artefacts.read(record, _Record, {1, FORMAT})
    artefacts.check_files(path.parent, {path.name: about.data_sha256})
    with artefacts.readable(path, SafetensorError):
        state = dict(_unpack(_metadata(path), load_file(path)))
    optional = {"names"} if about.format == 1 else set()
    missing = [piece for piece in PIECES if piece not in state and piece not in optional]
    if missing:
        raise CorruptError(f"{path}: it lacks {', '.join(missing)}")
    artefacts.checked(path, _Numbers, {name: state[name] for name in _Numbers.model_fields})
    return state


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _records(folder: Path) -> list[Path]:
    """List the JSON files of all checkpoints, the oldest first."""
    return sorted(path for path in folder.glob(f"{STEP}.json") if path.is_file())


def seed_rng(seed: int) -> None:
    """Start every generator that a student, loss or balancer may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Start every generator anew for a step, so that its draws depend on no step before."""
    seed_rng(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def rng_state() -> State:
    """Return the state of every generator that `seed_rng` starts."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "rng_torch": torch.get_rng_state(),
        "rng_cuda": cuda,
        "rng_numpy": [name, torch.from_numpy(keys.copy()), position, has_gauss, gauss],
        "rng_python": random.getstate(),
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put every generator back; done last, so that nothing draws in between."""
    torch.set_rng_state(state["rng_torch"])
    if state["rng_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng_cuda"])
    name, keys, position, has_gauss, gauss = state["rng_numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, gauss))
    version, internal, gauss_next = state["rng_python"]
    random.setstate((version, tuple(internal), gauss_next))


class Stop:
    """Record whether a signal asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; the second one ends the process at once."""
        if self.asked:
            os._exit(128 + number)
        self.signal = number
        log.info("stopping after this step; a checkpoint is being saved")

    def obey(self) -> None:
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked:
            raise SystemExit(128 + (self.signal or 0))


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into a question that the loop asks after each step."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {s: signal.signal(s, stop.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _metadata(path: Path) -> Any:
    """Read the JSON tree in a safetensors file's header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(size))["__metadata__"]["state"])


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree into `tensors`; return the tree with their names in place."""
    if isinstance(value, Tensor):
        # a copy, because safetensors refuses tensors that share memory
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _pack(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]
        return {"dict": items}  # pairs, because JSON would turn integer keys into text
    if isinstance(value, list | tuple):
        return {"list": [_pack(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    (kind, value), *_ = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(inner, tensors) for key, inner in value}
    if kind == "list":
        return [_unpack(inner, tensors) for inner in value]
    return value
