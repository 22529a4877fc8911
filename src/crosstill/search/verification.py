"""Verify an index: every file, every vector, every photo."""

import hashlib
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import artefacts, files
from crosstill.bundle import Bundle, check_same
from crosstill.errors import CorruptError, CrosstillError, ImageError, printable
from crosstill.search import builder_memory, catalogue, index_folder, scan
from crosstill.search.catalogue import Catalogue, damaged
from crosstill.search.index_folder import Pointer
from crosstill.search.milvus_vectors import LITE
from crosstill.search.scan import KnownFile
from crosstill.search.vector_index import VectorIndex

CHUNK = 10_000  # vectors that are looked at at a time
LONGER = 0.02  # by which a vector of 8-bit codes may miss unit length


@dataclass(frozen=True)
class Verdict:
    """The result of a verification.

    Attributes:
        photos: in the index; 0 where its pointer is damaged.
        problems: one line each: what is damaged.
        mend: the command that mends and updates the index.
        gone, changed: how many files are no longer there, or are not what was indexed.
        outdated: a line for each of those files, or for a whole folder of files that are gone.
    """

    photos: int
    problems: list[str]
    mend: str
    gone: int = 0
    changed: int = 0
    outdated: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(index: Path) -> Verdict:
    """Check all of an index; nothing is changed.

    Raises:
        DataError: there is no index.
        LockedError: it is being built.
    """
    try:
        pointer = index_folder.read_pointer(index)
    except CorruptError as error:
        return Verdict(0, [str(error)], _mend(index, None))
    with files.locked(index):
        damaged_files = [str(error) for error in index_folder.find_damage(index, pointer)]
        checks = (_bundle,) if damaged_files else (_bundle, _contents)
        memory = _problem(_memory, index, pointer)
        lines = [*damaged_files, *(_problem(check, index, pointer) for check in checks), memory]
        problems = [line for line in lines if line]
        verdict = Verdict(pointer.photos, problems, _mend(index, pointer))
        path = index / index_folder.MEMORY
        known = {} if memory or not path.is_file() else builder_memory.read_files(path)
        return _compared(verdict, index, pointer, known)


def _problem(check: Callable[[Path, Pointer], None], index: Path, pointer: Pointer) -> str | None:
    try:
        check(index, pointer)
    except CrosstillError as error:
        return str(error)
    return None


def _bundle(index: Path, pointer: Pointer) -> None:
    bundle = Bundle.open(artefacts.member(index, pointer.bundle))
    check_same(pointer.identity, bundle.identity, f"{bundle.folder} is not the index's bundle")


def _contents(index: Path, pointer: Pointer) -> None:
    """Check catalogue and vectors, each by itself and against the other."""
    folder = index_folder.generation_folder(index, pointer.generation)
    with (
        closing(Catalogue(folder / catalogue.NAME)) as photos,
        closing(index_folder.open_vectors(index, pointer)) as vectors,
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
    path = index / index_folder.MEMORY
    if path.is_file():
        builder_memory.check(path)


def _compared(
    verdict: Verdict, index: Path, pointer: Pointer, known: Mapping[str, KnownFile]
) -> Verdict:
    """Add to a verdict the files that are gone or have changed."""
    root = Path(pointer.folder)
    folder = index_folder.generation_folder(index, pointer.generation)
    try:
        with closing(Catalogue(folder / catalogue.NAME)) as photos:
            rows = photos.rows()
    except CrosstillError:  # it is among the problems already
        return verdict
    gone, changed = {}, []
    for path, row in sorted(rows.items()):
        try:
            status = os.stat(root / path)
        except OSError as error:
            gone[path] = f"{printable(path)}: {error.strerror}"
            continue
        if why := _change(root, path, row, status, known.get(path)):
            changed.append(f"{printable(path)}: {why}")
    folders = {f: n for f, n in scan.count_emptied(gone, rows.keys() - gone).items() if n > 1}
    lines = [
        f"{printable(str(root / f))}: all {n:,} photos in it are gone" for f, n in folders.items()
    ]
    emptied = tuple("" if f == "." else f"{f}/" for f in folders)
    lines += [line for path, line in gone.items() if not path.startswith(emptied)]
    return replace(verdict, gone=len(gone), changed=len(changed), outdated=sorted(lines + changed))


def _change(
    root: Path,
    path: str,
    row: catalogue.Row,
    status: os.stat_result,
    known: KnownFile | None,
) -> str:
    """Return how a photo differs from what was indexed; "" where it does not."""
    if (status.st_size, status.st_mtime_ns) != (row.size, row.mtime_ns):
        return "changed since it was indexed"
    if known and (known.stamp.ctime_ns, known.sha) == (status.st_ctime_ns, row.sha):
        return ""
    try:
        if hashlib.sha256(scan.read_photo(root, path)).digest() == row.sha:
            return ""
    except ImageError as error:
        return error.reason
    return "changed since it was indexed, and yet of the same size and time"


def _mend(index: Path, pointer: Pointer | None) -> str:
    """Return the command that mends the index, with its own bundle where that is whole."""
    if pointer is None:
        return f"crosstill index BUNDLE FOLDER --out {shlex.quote(str(index))}"
    own = str(index / pointer.bundle)
    bundle = "BUNDLE" if _problem(_bundle, index, pointer) else shlex.quote(own)
    where = [shlex.quote(printable(name)) for name in (pointer.folder, str(index))]
    command = f"crosstill index {bundle} {where[0]} --out {where[1]}"
    place = Path(index_folder.milvus_place(index, pointer.milvus["uri"]) if pointer.milvus else "")
    return command if place.suffix != LITE or place.exists() else f"{command} --milvus NEW.db"
