"""Fill the folder of an export aside and move it to its place whole, or not at all.

What is written lies beside its place under a temporary name. A kill leaves that name and nothing
else; whoever exports to the same place next sweeps it away.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosstill import artefacts, files
from crosstill.errors import ConfigError, LockedError

RECORD = "export.json"  # what the folder holds; only a folder with one is ever replaced
_FORMAT = 1


@contextmanager
def aside(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """Give a new, empty folder to fill; when the block ends well, it takes the place of `folder`.

    An earlier export is replaced in one step: at every moment the place holds the old one or the
    new one, whole. When the block raises, all is as it was.

    Args:
        folder: the place.
        needed: bytes that the export will hold at least, where that is known.

    Raises:
        ConfigError: the place holds something that no export wrote.
        InputError: the place cannot be written to.
        LockedError: another process is exporting to it.
        DiskFullError: the disk is full.
    """
    folder = folder.resolve()
    check_place(folder)
    files.writable_folder(folder.parent)
    with files.writing(folder, needed, whole=True), _made(folder) as new:
        yield new
        _seal(new)
        check_place(folder)  # much may have happened meanwhile
        old = new.with_name(f"{files.TEMPORARY}{os.getpid()}-old-{folder.name}")
        files.swap_in(new, folder, old)


def check_place(folder: Path) -> None:
    """Refuse a place that holds something which no export wrote.

    Raises:
        ConfigError: it is a file, or a folder with other things; one of them is named.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; give a folder that is empty or does not exist")
    written = {RECORD}
    if (folder / RECORD).is_file():
        written |= files.read_sealed(folder / RECORD, {_FORMAT})["files"].keys()
    present = sorted(path.relative_to(folder).as_posix() for path in _all_files(folder))
    for name in (name for name in present if name not in written):
        raise ConfigError(
            f"{folder}: holds {name}, which no export wrote; give a folder that is empty or "
            "does not exist"
        )


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """Make the folder aside, lock it while the block runs, and remove it afterwards."""
    new = folder.with_name(f"{files.TEMPORARY}{os.getpid()}-{folder.name}")
    # The parent is held for a moment, so that nobody takes the new folder for a leftover.
    with _holding(folder.parent, folder, wait=True):
        pattern = re.compile(rf"{re.escape(files.TEMPORARY)}\d+-(old-)?{re.escape(folder.name)}")
        for leftover in filter(lambda path: pattern.fullmatch(path.name), folder.parent.iterdir()):
            _sweep(leftover, folder)
        new.mkdir()
        handle = os.open(new, os.O_RDONLY)
        files.hold(handle, folder, wait=True)
    try:
        yield new
    finally:
        os.close(handle)
        shutil.rmtree(new, ignore_errors=True)


def _sweep(leftover: Path, folder: Path) -> None:
    if not leftover.is_dir():
        return
    with _holding(leftover, folder, wait=False) as locked:
        if not locked:
            raise LockedError(
                f"{folder}: another process is exporting to it; wait for it, or choose another "
                "folder"
            )
        shutil.rmtree(leftover)


@contextmanager
def _holding(folder: Path, place: Path, wait: bool) -> Iterator[bool]:
    """Lock a folder itself, without a file in it; the kernel lets go of it even after kill -9."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield files.hold(handle, place, wait)
    finally:
        os.close(handle)


def _seal(folder: Path) -> None:
    """Write down what the folder holds, and bring all of it to the disk."""
    paths = sorted(_all_files(folder))
    for path in paths:
        files.as_others(path)
    digests = artefacts.digests(folder, [path.relative_to(folder).as_posix() for path in paths])
    files.write_json(folder / RECORD, files.sealed({"format": _FORMAT, "files": digests}))
    for path in [*paths, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        files.flush(path)


def _all_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
