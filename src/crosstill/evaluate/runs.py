"""Reading of `config.json` in the folder of a run, which a stranger may have made."""

from pathlib import Path
from typing import Any

from crosstill import artefacts
from crosstill.errors import CorruptError

CONFIG = "config.json"
FORMAT = 2  # 1 did not keep the order of the losses


class _Cache(artefacts.Record):
    folder: str
    digest: str


class _Teacher(artefacts.Record):
    name: str | None = None  # of none, where a run had no teacher
    source: str | None = None
    licence: str | None = None
    kind: str | None = None
    modalities: list[str] | None = None


class _Data(artefacts.Record):
    name: str
    licence: str | None = None


class _Record(artefacts.Record):
    settings: dict[str, Any]  # crosstill.train.config says which there are
    losses: list[str] | None = None
    cache: _Cache
    teacher: _Teacher
    data: _Data
    command: str
    versions: dict[str, str]


def read_record(folder: Path) -> dict[str, Any]:
    """Read what `config.json` says of a run; its settings are not checked.

    Raises:
        CorruptError: it is missing, a link or damaged, a newer crosstill wrote it, or a field is
            not what it should be.
    """
    path = artefacts.member(folder, CONFIG)
    if not path.is_file():
        raise CorruptError(f"{path}: the file is missing; restore it from a copy")
    return artefacts.read(path, _Record, {1, FORMAT}).model_dump()
