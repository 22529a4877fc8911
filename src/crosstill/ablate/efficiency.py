"""Table 3: what teacher and student cost. Nothing is trained: a student's size is known before.

The paper (arXiv 2404.10838) times an inference on a GPU; here single items are timed on one thread
of the CPU, in turn, so that a noisy machine is noisy to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from crosstill import files, formats, students
from crosstill.cache import CacheBase
from crosstill.errors import ConfigError, CorruptError, InputError, MismatchError
from crosstill.evaluate.evaluation import Efficiency, figure, measure_latency
from crosstill.models import open as open_model
from crosstill.teachers.base import Teacher
from crosstill.train import TrainConfig

NAME = "table3"
TITLE = "What teacher and student cost"
HEADINGS = ("", "parameters", "of the teacher's", "ms/image", "ms/caption", "times faster")
TEACHER_PAPER, STUDENT_PAPER = "1,900 M, 16.5 ms", "197 M, 2.1 ms"  # of its two rows


@dataclass(frozen=True)
class Row:
    """A model and what it costs.

    Attributes:
        name: what the table calls it.
        parameters: of the model; None of vectors without one.
        efficiency: its times; None where it could not be timed.
        paper: what the paper reports of its own model.
    """

    name: str
    parameters: int | None
    efficiency: Efficiency | None
    paper: str

    @property
    def ms(self) -> float | None:
        """Milliseconds for one photo and one caption."""
        times = self.efficiency
        return times.image_ms + times.caption_ms if times else None

    def to_json(self) -> dict[str, Any]:
        times = self.efficiency.to_json() if self.efficiency else None
        return {**vars(self), "efficiency": times}


@dataclass(frozen=True)
class Costs:
    """The teacher of a cache, in the first row, and students.

    Attributes:
        rows: the teacher first.
        note: why the teacher could not be timed; "" where it was.
        command: what the user typed.
    """

    rows: tuple[Row, ...]
    note: str
    command: str

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and text of the table."""
        return [*HEADINGS, "paper*"], [self._cells(row) for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        rows = [row.to_json() for row in self.rows]
        return {"table": NAME, "rows": rows, "note": self.note, "command": self.command}

    @property
    def legend(self) -> str:
        """Explain the columns, in sentences."""
        text = (
            "Times of single items on one thread of this machine's CPU, the median of 30; times "
            "faster for one photo and one caption. *Of the paper's own teacher and student, "
            f"on a GPU: not comparable with ours. {self.note}"
        )
        return text.strip()

    def markdown(self) -> str:
        """Write the table as Markdown, with its legend."""
        body = formats.markdown(*self.cells())
        return "\n".join([f"**{TITLE}**", "", body, "", self.legend, ""])

    def latex(self) -> str:
        """Write the table as LaTeX."""
        return formats.latex(TITLE, *self.cells())

    def save(self, folder: Path) -> None:
        """Write the table into the grid's folder: Markdown, LaTeX and JSON."""
        files.writable_folder(folder)
        files.write_bytes(folder / f"{NAME}.md", self.markdown().encode())
        files.write_bytes(folder / f"{NAME}.tex", self.latex().encode())
        files.write_json(folder / f"{NAME}.json", self.to_json())

    def _cells(self, row: Row) -> list[str]:
        first, times = self.rows[0], row.efficiency
        share = row.parameters / first.parameters if row.parameters and first.parameters else None
        faster = first.ms / row.ms if first.ms and row.ms else None
        return [
            row.name,
            "–" if row.parameters is None else f"{row.parameters:,}",
            "–" if share is None else f"{share:.1%}",
            *([f"{times.image_ms:.2f}", f"{times.caption_ms:.2f}"] if times else ["–", "–"]),
            "–" if faster is None else figure(faster),
            row.paper,
        ]


def read(folder: Path) -> Costs | None:
    """Read the table of a grid; None where it was not made.

    Raises:
        CorruptError: its file is damaged.
    """
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Costs).validate_python(files.read_json(path))
    except ValidationError:
        raise CorruptError(f"{path}: damaged; run `crosstill ablate {NAME}` again") from None


def measure(cache: CacheBase, chosen: Sequence[str], command: str = "") -> Costs:
    """Count the parameters of a cache's teacher and of students, and time them.

    Args:
        cache: of features; its teacher is opened where the cache says that it was.
        chosen: students, each a preset or a TOML file.
        command: what the user typed.

    Raises:
        MismatchError: a score cache, or one without a teacher.
        ConfigError, ModelError: a student that cannot be built.
    """
    if cache.listed or not cache.modalities:
        raise MismatchError(
            f"{cache.folder} holds no features of a dual encoder, whose cost {NAME} compares; "
            "for fusion models use `crosstill evaluate MODEL DATA --efficiency`"
        )
    if len(set(chosen)) != len(chosen) or not chosen:
        raise ConfigError(f"{NAME} compares different students; give --student once for each")
    captions = cache.captions(TrainConfig().train_split)
    models: dict[str, Teacher] = {
        f"student ({name})": students.build(name, dim=cache.dim, captions=captions)
        for name in chosen
    }
    teacher = f"teacher ({Path(str(cache.teacher['name'])).name})"
    note = ""
    try:
        models[teacher] = _teacher(cache)
    except InputError as error:
        note = f"The teacher was not timed: {error}."
    times = measure_latency(models)
    count = cache.teacher.get("parameters")
    rows = [Row(teacher, count, times.pop(teacher, None), TEACHER_PAPER)]
    rows += [Row(name, cost.parameters, cost, STUDENT_PAPER) for name, cost in times.items()]
    return Costs(tuple(rows), note, command)


def _teacher(cache: CacheBase) -> Teacher:
    """Open the model that filled a cache.

    Raises:
        InputError: it is not where it was, has no model, or is another one.
    """
    source = cache.teacher["source"]
    if source is None:
        raise InputError(f"{cache.folder} does not say where it is")
    model = open_model(source, "encoder", torch.device("cpu"))
    if model.identity() != cache.teacher["identity"]:
        raise MismatchError(f"{source} is not the model that filled {cache.folder}")
    return model
