"""Is an index whole? Every file, every vector, every photo that it speaks of."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import files
from crosstill.errors import CorruptError, CrosstillError, printable
from crosstill.search import catalogue, generations, quarantine, work
from crosstill.search.bundle import Bundle, check_same
from crosstill.search.catalogue import Catalogue, damaged
from crosstill.search.generations import Pointer
from crosstill.search.vectors import VectorIndex

CHUNK = 10_000  # vectors that are looked at at a time
LONGER = 0.02  # by which a vector of 8-bit codes may miss unit length


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        photos: in the index; 0 where its pointer is damaged.
        problems: one line each: what is damaged.
        outdated: one line each: photos that are gone or have changed since they were indexed.
        mend: the command that mends and updates the index.
    """

    photos: int
    problems: list[str]
    outdated: list[str]
    mend: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(index: Path) -> Verdict:
    """Check all of an index; nothing is changed.

    Raises:
        DataError: there is no index.
        LockedError: it is being built.
    """
    try:
        pointer = generations.read(index)
    except CorruptError as error:
        return Verdict(0, [str(error)], [], _mend(index, None))
    with files.locked(index):
        damaged_files = [str(error) for error in generations.problems(index, pointer)]
        checks = (_bundle, _memory) if damaged_files else (_bundle, _contents, _memory)
        found = [*damaged_files, *(_problem(check, index, pointer) for check in checks)]
        problems = [line for line in found if line]
        return Verdict(pointer.photos, problems, _outdated(index, pointer), _mend(index, pointer))


def _problem(check: Callable[[Path, Pointer], None], index: Path, pointer: Pointer) -> str | None:
    try:
        check(index, pointer)
    except CrosstillError as error:
        return str(error)
    return None


def _bundle(index: Path, pointer: Pointer) -> None:
    bundle = Bundle.open(index / pointer.bundle)
    check_same(pointer.identity, bundle.identity, f"{bundle.folder} is not the index's bundle")


def _contents(index: Path, pointer: Pointer) -> None:
    """Catalogue and vectors, each by itself and against the other."""
    folder = generations.folder_of(index, pointer.generation)
    with (
        closing(Catalogue(folder / catalogue.NAME)) as photos,
        closing(generations.open_vectors(index, pointer)) as vectors,
    ):
        photos.check()
        numbers = np.array(sorted(photos.numbers().values()), np.int64)
        there = vectors.ids()
        lost, more = np.setdiff1d(numbers, there), np.setdiff1d(there, numbers)
        if len(numbers) != pointer.photos or len(lost) or (len(more) and not pointer.milvus):
            raise damaged(
                folder,
                f"{pointer.photos} photos were published, the catalogue holds {len(numbers)}, of "
                f"which {len(lost)} have no vector, and {len(more)} vectors have no photo",
            )
        _lengths(folder, vectors, numbers)


def _lengths(folder: Path, vectors: VectorIndex, numbers: np.ndarray) -> None:
    for start in range(0, len(numbers), CHUNK):
        lengths = np.linalg.norm(vectors.vectors(numbers[start : start + CHUNK]), axis=1)
        bad = int((np.abs(lengths - 1) > LONGER).sum())
        if bad:
            raise damaged(folder, f"{bad} vectors are not of unit length")


def _memory(index: Path, pointer: Pointer) -> None:
    path = index / generations.WORK
    if path.is_file():
        quarantine.check(index, work.check(path))


def _outdated(index: Path, pointer: Pointer) -> list[str]:
    """A line for every photo that is not where it was, or not as it was."""
    root = Path(pointer.folder)
    if not root.is_dir():
        return [f"{printable(str(root))}: the folder of the photos is gone"]
    try:
        with closing(
            Catalogue(generations.folder_of(index, pointer.generation) / catalogue.NAME)
        ) as photos:
            rows = photos.rows()
    except CrosstillError:  # it is among the problems already
        return []
    return list(_differing(root, rows))


def _differing(root: Path, rows: dict[str, catalogue.Row]) -> Iterator[str]:
    for path, row in sorted(rows.items()):
        try:
            status = os.stat(root / path)
        except OSError as error:
            yield f"{printable(path)}: {error.strerror}"
            continue
        if (status.st_size, status.st_mtime_ns) != (row.size, row.mtime_ns):
            yield f"{printable(path)}: changed since it was indexed"


def _mend(index: Path, pointer: Pointer | None) -> str:
    """The command to run: with the index's own bundle, where that is whole."""
    if pointer is None:
        return f"crosstill index BUNDLE FOLDER --out {shlex.quote(str(index))}"
    own = str(index / pointer.bundle)
    bundle = "BUNDLE" if _problem(_bundle, index, pointer) else shlex.quote(own)
    where = [shlex.quote(printable(name)) for name in (pointer.folder, str(index))]
    return f"crosstill index {bundle} {where[0]} --out {where[1]}"
