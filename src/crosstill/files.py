"""Files that survive a kill: atomic writes, checksums, locks.

A write is complete or absent: it goes to a temporary folder beside the target, is flushed to
disk, renamed, and the folder entry is flushed too. Temporary names start with `TEMPORARY`, so
that whoever opens a folder can sweep away what a killed process left there.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosstill.errors import CorruptError, InputError, LockedError

TEMPORARY = ".writing-"
_MASK = os.umask(0)  # it can only be read by setting it
os.umask(_MASK)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, then put what it wrote in place of `path`.

    The temporary file has a folder of its own, because libraries write beside the path that they
    are given (safetensors to `.tmpXXXXXX`), and a kill leaves that too.
    """
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent) as aside:
        temporary = Path(aside) / path.name
        write(temporary)
        as_others(temporary)
        flush(temporary)
        os.replace(temporary, path)
    flush(path.parent)


def as_others(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors lets only its owner read it."""
    path.chmod(0o666 & ~_MASK)


def write_bytes(path: Path, data: bytes) -> None:
    """Put these bytes in place of the file's, atomically."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: object) -> None:
    """Write sorted, indented JSON: equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON that crosstill wrote; a damaged file is a `CorruptError` that names it."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptError(
            f"{path}: not readable JSON ({error}); restore it from a copy, or make it anew"
        ) from None


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The value with a `sha256` of itself, so that a flipped bit anywhere in it is seen."""
    body = {k: v for k, v in value.items() if k != "sha256"}
    return {**body, "sha256": digest_json(body)}


def read_sealed(path: Path, versions: set[int]) -> dict[str, Any]:
    """Read JSON written through `sealed`; check its own hash and its format version.

    Raises:
        CorruptError: the file was damaged, or a newer crosstill wrote it.
    """
    value = read_json(path)
    if not isinstance(value, dict) or sealed(value) != value:
        raise CorruptError(
            f"{path}: its checksum is wrong; restore it from a copy, or make it anew"
        )
    if value.get("format") not in versions:
        raise CorruptError(
            f"{path}: format {value.get('format')} is unknown here (known: "
            f"{', '.join(map(str, sorted(versions)))}); upgrade crosstill, or make it anew"
        )
    return value


def digest_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str) -> None:
    """Refuse a file that is missing or whose SHA-256 is not the expected one."""
    if not path.is_file():
        raise CorruptError(f"{path}: the file is missing; restore it from a copy, or make it anew")
    if digest_file(path) != expected:
        raise CorruptError(
            f"{path}: its checksum is wrong; restore it from a copy, or make it anew"
        )


def writable_folder(path: Path) -> Path:
    """Make a folder, or say in one line why it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{TEMPORARY}{os.getpid()}-probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # another thread may have had the same name
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from None
    return path


def sweep(folder: Path, name: str = "") -> None:
    """Remove what a killed process left half written. Call it only while holding the lock.

    Args:
        folder: where to look.
        name: of the one file whose leftovers go, where others may be writing the other files.
    """
    for path in folder.glob(f"{TEMPORARY}{glob.escape(name)}{'-' if name else ''}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, wait: bool = False, name: str = ".lock") -> Iterator[None]:
    """Hold a folder while the block runs; the kernel lets go of it even after kill -9.

    Args:
        folder: what to hold.
        wait: stand in line behind whoever holds it.
        name: of the lock's file, where several things in a folder are held one by one.

    Raises:
        LockedError: another live process holds it; the message names it.
    """
    path = folder / name
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise LockedError(
                f"{folder} is in use by {owner}; wait for it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
