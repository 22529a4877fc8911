"""A run's folder: what is in it, and how it is written so that a kill cannot spoil it.

config.json      sealed: settings, cache, command, versions
student/         the student before training
checkpoints/     the newest states of the run
best/            the student with the best validation RSUM, or agreement where there are no pairs
best.json        its epoch and figures
events.jsonl     one line a logged step or epoch
metrics.json     the finished run's summary
quarantine.jsonl images that the cache left out, with the reason
nonfinite.json   the batch of a step whose losses were not finite
tensorboard/     event files, where TensorBoard is installed
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import transformers
from torch import nn

import crosstill.students as students
from crosstill import artefacts, files, models
from crosstill import cache as caches
from crosstill.cache import CacheBase, is_cache
from crosstill.cache.format import QUARANTINE
from crosstill.errors import ConfigError, CorruptError, InputError, MismatchError
from crosstill.evaluate.agreement import NAMES
from crosstill.models import CONFIG, FORMAT
from crosstill.students.student import RECORD, Student
from crosstill.train.checkpoint import Best
from crosstill.train.config import TrainConfig, as_started, parse

STARTING = ".starting"  # there while a run is being laid out
# what a run writes to; a link there would lead out of its folder
_WRITTEN = (
    *(CONFIG, "metrics.json", "best.json", "events.jsonl", "nonfinite.json", QUARANTINE, STARTING),
    *("student", "best", "best.new", "best.old", "checkpoints", "tensorboard"),
)


class _Metrics(artefacts.Record):
    best: Best
    teacher: dict[str, Any] | None


class Learner(Protocol):
    """A model that a run trains: a `torch.nn.Module` that can be saved into a folder."""

    drops: bool  # whether dropout is on in training mode

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def to(self, device: torch.device, /) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def fusion_layers(self) -> list[nn.Parameter]: ...

    def parameters_by_part(self) -> dict[str, int]: ...

    def count_truncated(self, texts: Sequence[str]) -> int: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Run:
    """A run that has ended, or any run folder opened to look at."""

    folder: Path

    @property
    def best(self) -> Student:
        """The student that was best on the validation split.

        Raises:
            ModelError: the run trained a fusion model; see `matcher`.
        """
        return students.load(self.folder / "best")

    @property
    def matcher(self) -> Any:
        """As `best`, of a run that trained a fusion model.

        Raises:
            ModelError: it trained a dual encoder.
        """
        return models.open(self.folder / "best", "matcher")

    @property
    def trains_dual(self) -> bool:
        """Tell whether its model is a dual encoder, and not a fusion model."""
        return (self.folder / "best" / RECORD).is_file()

    @property
    def untrained(self) -> Student:
        """The student as it was before training."""
        return students.load(self.folder / "student")

    @property
    def config(self) -> dict[str, Any]:
        """Settings, cache and command of the run."""
        return read_record(self.folder)

    def summary(self) -> str:
        """Describe the best epoch of the finished run in a few words."""
        best = self.metrics["best"]
        key = next(key for key in NAMES if key in best)
        return f"best val {NAMES[key]} {best[key]:.2f} at epoch {best['epoch']}"

    @property
    def metrics(self) -> dict[str, Any]:
        """The finished run's summary.

        Raises:
            InputError: the run is not finished.
            CorruptError: it is a link or damaged.
        """
        path = artefacts.member(self.folder, "metrics.json")
        if not path.is_file():
            raise InputError(f"{path}: missing; finish the run with `crosstill train … --resume`")
        metrics = artefacts.checked(path, _Metrics, files.read_json(path))
        return metrics.model_dump(exclude_unset=True)


def learner(folder: Path) -> Any:
    """Open the dual encoder or fusion model that a run saved into a folder.

    Raises:
        ModelError: it holds neither.
    """
    if (folder / RECORD).is_file():
        return students.load(folder)
    return models.open(folder, "matcher")


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `config.json` says of a run; settings that it lacks have their defaults.

    Raises:
        CorruptError: it is missing, a link or damaged, a newer crosstill wrote it, or a field is
            not what it should be.
    """
    record = models.read_record(folder)
    path = folder / CONFIG
    try:
        settings = parse(as_started(record["settings"], record["format"]))
    except ConfigError as error:
        raise CorruptError(f"{path}: settings.{error}; {artefacts.ANEW}") from None
    if sorted(record["losses"] or settings.losses) != sorted(settings.losses):
        raise CorruptError(f"{path}: losses: not those of its settings; {artefacts.ANEW}")
    if not isinstance(settings.balance.get("name"), str):
        raise CorruptError(f"{path}: settings.balance.name: not a text; {artefacts.ANEW}")
    return {**record, "settings": settings.model_dump(mode="json")}


def is_run(folder: Path) -> bool:
    """Whether a run was started there."""
    return (folder / CONFIG).is_file()


def create(
    folder: Path, config: TrainConfig, student: Learner, cache: CacheBase, command: str
) -> None:
    """Lay out a new run; the folder is held by the caller.

    Raises:
        ConfigError: the folder holds something else, which stays as it is.
    """
    _clear(folder)
    (folder / STARTING).touch()
    (folder / "checkpoints").mkdir()
    student.save(folder / "student")
    shutil.copyfile(cache.folder / QUARANTINE, folder / QUARANTINE)
    record = {
        "format": FORMAT,
        "settings": config.model_dump(mode="json"),
        # JSON is written with sorted keys, but losses are added up and weighed in this order
        "losses": list(config.losses),
        "cache": {"folder": str(cache.folder.resolve()), "digest": cache.digest},
        "teacher": cache.teacher,
        "data": cache.header["data"],
        "command": command,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    # last, because a folder with it is a run
    files.write_json(folder / CONFIG, files.sealed(record))
    (folder / STARTING).unlink()


def _clear(folder: Path) -> None:
    """Remove what a run left that was killed while it was being laid out, and nothing else."""
    files.sweep(folder)
    # the mark itself stays, or a kill during the clearing would leave files without it
    found = [path for path in folder.iterdir() if path.name not in (".lock", STARTING)]
    if found and not (folder / STARTING).exists():
        raise ConfigError(f"{folder} holds {found[0].name} and no run; give another --out")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_links(folder: Path) -> None:
    """Refuse links where a run writes: whoever sent it could have files of others overwritten.

    Raises:
        CorruptError: there is one.
    """
    for name in _WRITTEN:
        artefacts.member(folder, name)


def check_new(folder: Path) -> None:
    """Refuse to start a run where one is.

    Raises:
        ConfigError: there is a run in the folder.
    """
    if is_run(folder):
        raise ConfigError(f"{folder} already holds a run; give --resume, or another --out")


def check_resumable(folder: Path, config: TrainConfig, cache: CacheBase) -> TrainConfig:
    """Refuse to go on with a run in another way than it was started.

    Returns:
        The run's settings, losses in the run's order; of a run that did not keep it, `config`.

    Raises:
        InputError: there is no run in the folder.
        MismatchError: the cache is not the run's.
        ConfigError: a setting differs from the run's.
    """
    if not is_run(folder):
        raise InputError(f"{folder}: there is no run to resume; leave out --resume")
    record = read_record(folder)
    if record["cache"]["digest"] != cache.digest:
        raise MismatchError(
            f"{folder} was trained from another cache (teacher, dataset or candidates differ: "
            f"{record['cache']['folder']}), not {cache.folder}; resume with that one"
        )
    theirs = settings_of(record)
    config = _with_queues(config, theirs)
    different = [
        name for name in TrainConfig.model_fields if getattr(theirs, name) != getattr(config, name)
    ]
    if different:
        name = different[0]
        raise ConfigError(
            f"{folder} was started with {name} = {getattr(theirs, name)!r}; "
            "a resumed run keeps its settings: leave that --set out, or start another run"
        )
    return config if record["format"] == 1 else theirs


def _with_queues(config: TrainConfig, run: TrainConfig) -> TrainConfig:
    """Take over the lengths of a run's queues that the settings leave open."""
    kept = {
        name: {key: value for key, value in options.items() if key == "queue_size"}
        for name, options in run.losses.items()
    }
    losses = {name: kept.get(name, {}) | options for name, options in config.losses.items()}
    return config.model_copy(update={"losses": losses})


def reopen(folder: Path) -> None:
    """Tidy up a run that was stopped; its checkpoints wait until one of them was read."""
    files.sweep(folder)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / STARTING).unlink(missing_ok=True)
    _finish_swap(folder)


def settings_of(record: Mapping[str, Any], order: Sequence[str] = ()) -> TrainConfig:
    """Read the settings that a run was started with.

    Args:
        record: of `read_record`.
        order: of the losses, where the record does not keep it.
    """
    settings = dict(record["settings"])
    names = record.get("losses") or order or settings["losses"]
    return parse({**settings, "losses": {name: settings["losses"][name] for name in names}})


def save_best(folder: Path, student: Learner, metrics: dict[str, Any]) -> None:
    """Put a new best student in place of the old; a kill leaves one of the two, whole."""
    places = (folder / name for name in ("best", "best.new", "best.old"))
    with files.filled_aside(*places) as new:
        student.save(new)
    files.write_json(folder / "best.json", metrics)


def _finish_swap(folder: Path) -> None:
    """Bring back the best student of a run that was killed between the steps of a swap-in."""
    if not (folder / "best").exists() and (folder / "best.old").exists():
        (folder / "best.old").rename(folder / "best")
    for name in ("best.new", "best.old"):
        shutil.rmtree(folder / name, ignore_errors=True)


class Events:
    """The lines of events.jsonl, and TensorBoard's event files when it is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open for a run that has taken `step` steps; later lines of a killed run go."""
        path = folder / "events.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        files.write_bytes(path, b"".join(line + b"\n" for line in kept))
        self._file = path.open("a")
        self._board = _tensorboard(folder / "tensorboard", step)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """One line; numbers in `values`, nested one level at most, become scalars."""
        line = json.dumps({"kind": kind, "step": step, **values}, sort_keys=True)
        self._file.write(line + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: bytes) -> float:
    """The step of a line; a torn last line counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


def _scalars(values: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += [(f"{name}/{k}", v) for k, v in value.items() if isinstance(v, int | float)]
        elif isinstance(value, int | float):
            flat.append((name, value))
    return flat


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def open_cache(folder: Path, record: dict[str, Any]) -> CacheBase:
    """Open the cache that a run learnt from, whole and unchanged.

    Args:
        folder: of the run.
        record: its `config.json`.

    Raises:
        InputError: the cache is gone.
        MismatchError: another cache is in its place.
    """
    place = Path(record["cache"]["folder"])
    if not is_cache(place):
        raise InputError(
            f"{folder} learnt from the cache {place}, which is gone; put it back there, "
            "the report needs what it holds"
        )
    cache = caches.open(place)
    if cache.digest != record["cache"]["digest"]:
        raise MismatchError(
            f"{place} is no longer the cache that {folder} learnt from; put that one back, "
            "the report needs what it holds"
        )
    return cache
