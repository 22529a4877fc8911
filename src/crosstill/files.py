"""Files that survive a kill and a full disk: atomic writes, checksums, locks.

A write is complete or absent: it goes to a temporary folder beside the target, is flushed to
disk, renamed, and the folder entry is flushed too. Temporary names start with `TEMPORARY`, so
that whoever opens a folder can sweep away what a killed process left there. Whatever is written
is written within `writing`, which turns each library's error of a full disk into one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from crosstill.errors import CorruptError, CrosstillError, DiskFullError, InputError, LockedError

if TYPE_CHECKING:
    import numpy as np

VERSION = "0.1.0"  # of crosstill, as the files that it writes name it
TEMPORARY = ".writing-"
REMEDY = "restore it from a copy, or make it anew"  # of a damaged file
MAX_JSON = 1 << 25  # bytes of a record: parsed, it takes up to twenty times as much
_MAKE_ROOM = "free some and run it again"
_FULL = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk",
}
# texts of a full disk in errors that are no OSError: Rust's (safetensors, tokenizers), SQLite's
_FULL_TEXTS = {f"(os error {code})": code for code in _FULL} | {
    "database or disk is full": errno.ENOSPC
}
_BEGAN = time.time()


@contextmanager
def writing(place: Path, needed: int | None = None, whole: bool = False) -> Iterator[None]:
    """Raise `DiskFullError` in place of whatever a library raises where a disk is full.

    Args:
        place: the file, folder or stream that the block writes, as the user knows it.
        needed: bytes that it writes; None where that is not known beforehand.
        whole: whether `place` is also named for files within it, which the user does not know.

    Raises:
        DiskFullError: the disk or the quota is full, or the file would be larger than is allowed.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, DiskFullError) and not whole:
                raise cause from None
            code = _full_code(cause)
            if code is not None:
                raise disk_full(place, code, needed) from None
            cause = cause.__cause__ or cause.__context__
        raise


def _full_code(error: BaseException) -> int | None:
    if isinstance(error, CrosstillError):
        return error.code if isinstance(error, DiskFullError) else None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _FULL else None
    return next((code for text, code in _FULL_TEXTS.items() if text in str(error)), None)


def disk_full(place: Path, code: int, needed: int | None = None) -> DiskFullError:
    """Return the error that says what is full, where, how much was needed, what is free.

    Args:
        place: the file or folder that could not be written.
        code: ENOSPC, EDQUOT or EFBIG.
        needed: bytes that were to be written.
    """
    figures = "" if needed is None else f" ({amount(needed)} needed)"
    if code == errno.ENOSPC:
        there = next(
            path for path in (place.absolute(), *place.absolute().parents) if path.exists()
        )
        disk = os.statvfs(there)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_files and not disk.f_favail:
            figures = " (its table of files is full)"
        elif needed is None or needed <= free:
            figures = f" (more needed than the {amount(free)} that are free)"
        else:
            figures = f" ({amount(needed)} needed, {amount(free)} free)"
    return DiskFullError(f"{place}: {os.strerror(code)}{figures}; {_FULL[code]}", code)


def amount(size: int) -> str:
    """Write a number of bytes for people.

    >>> amount(20480)
    '20.5 kB'
    """
    if size < 1000:
        return f"{size} bytes"
    value, units = size / 1000, ["kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:,.1f} {units[0]}"


def write_atomic(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Call `write` with a temporary path, then put what it wrote in place of `path`.

    The temporary file has a folder of its own, because libraries write beside the path that they
    are given (safetensors to `.tmpXXXXXX`), and a kill leaves that too. What killed processes left
    of this very file is swept away.

    Args:
        path: the file to write.
        write: writes the path that it is given.
        needed: bytes, where that is known.

    Raises:
        DiskFullError: there is no room for it.
    """
    with writing(path, needed):
        with scratch(path.parent, path.name) as folder:
            temporary = folder / path.name
            write(temporary)
            as_others(temporary)
            flush(temporary)
            os.replace(temporary, path)
        flush(path.parent)


@contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """Make a folder in `folder` for the block, and sweep away those that killed processes left.

    Args:
        folder: where to make it.
        name: what it is for, as a part of its own name.
    """
    pattern = re.compile(rf"{re.escape(TEMPORARY + name)}-(\d+)-\w+")
    for path in folder.iterdir():
        owner = pattern.fullmatch(path.name)
        with suppress(FileNotFoundError):  # another process sweeps too
            if owner and not _lives(int(owner[1]), path):
                _remove(path)
    prefix = f"{TEMPORARY}{name}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as made:
        yield Path(made)


def _lives(process: int, made: Path) -> bool:
    """Tell whether the process that made a file still runs."""
    if process == os.getpid():  # in a container every process may have the same number
        return made.stat().st_mtime >= _BEGAN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or a folder, which another process may be removing too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def as_others(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors lets only its owner read it."""
    path.chmod(0o666 & ~_umask())


@cache
def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    """Put these bytes in place of the file's, atomically."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data), len(data))


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file under exactly this name."""
    import numpy as np

    with path.open("wb") as file:
        # given a real file, numpy writes past Python and loses the reason of a failure
        np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)


def allocate(file: IO[bytes], size: int) -> None:
    """Make an open file so many bytes long, all of them on the disk.

    Writing to a mapping of a file with holes kills the process where the disk is full.
    """
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # not on this system
        block = bytes(2**20)
        for start in range(file.tell(), size, len(block)):
            file.write(block[: size - start])


def write_json(path: Path, value: object) -> None:
    """Write sorted, indented JSON: equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON that crosstill wrote; a damaged file is a `CorruptError` that names it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError(f"more than {amount(MAX_JSON)}")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not readable JSON ({error}); {REMEDY}") from None


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Add to a value the `sha256` of itself, so that a flipped bit anywhere in it is seen."""
    body = {k: v for k, v in value.items() if k != "sha256"}
    return {**body, "sha256": digest_json(body)}


def read_sealed(path: Path, versions: set[int]) -> dict[str, Any]:
    """Read JSON written through `sealed`; check its own hash and its format version.

    Raises:
        CorruptError: the file was damaged, or a newer crosstill wrote it.
    """
    value = read_json(path)
    if not isinstance(value, dict) or sealed(value) != value:
        raise CorruptError(f"{path}: its checksum is wrong; {REMEDY}")
    if value.get("format") not in list(versions):  # a list: the value may be unhashable
        raise CorruptError(
            f"{path}: format {value.get('format')} is unknown here (known: "
            f"{', '.join(map(str, sorted(versions)))}); upgrade crosstill, or make it anew"
        )
    return value


def digest_json(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, expected: str, remedy: str = REMEDY) -> None:
    """Refuse a file that is missing or whose SHA-256 is not the expected one."""
    if not path.is_file():
        raise CorruptError(f"{path}: the file is missing; {remedy}")
    if digest_file(path) != expected:
        raise CorruptError(f"{path}: its checksum is wrong; {remedy}")


def writable_folder(path: Path) -> Path:
    """Make a folder, or say in one line why it cannot be made or written to.

    Raises:
        InputError: it cannot be written to.
        DiskFullError: there is no room for it.
    """
    with _place(path):
        path.mkdir(parents=True, exist_ok=True)
        _probe(path)
    return path


def check_writable(path: Path) -> None:
    """Refuse a folder that cannot be made or written to, and make nothing.

    Raises:
        InputError: it cannot be written to.
        DiskFullError: there is no room for it.
    """
    with _place(path):
        _probe(next(there for there in (path, *path.absolute().parents) if there.exists()))


def _probe(folder: Path) -> None:
    probe = folder / f"{TEMPORARY}{os.getpid()}-probe"
    probe.touch()
    probe.unlink(missing_ok=True)  # another thread may have had the same name


@contextmanager
def _place(path: Path) -> Iterator[None]:
    with writing(path):
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise InputError(f"{path}: cannot write there ({error.strerror})") from None


def sweep(folder: Path, name: str = "") -> None:
    """Remove what a killed process left half written. Call it only while holding the lock.

    Args:
        folder: where to look.
        name: of the one file whose leftovers go, where others may be writing the other files.
    """
    for path in folder.glob(f"{TEMPORARY}{glob.escape(name)}{'-' if name else ''}*"):
        _remove(path)


@contextmanager
def locked(folder: Path, wait: bool = False, name: str = ".lock") -> Iterator[None]:
    """Hold a folder while the block runs; the kernel lets go of it even after kill -9.

    Args:
        folder: what to hold.
        wait: stand in line behind whoever holds it.
        name: of the lock's file, where several things in a folder are held one by one.

    Raises:
        LockedError: another live process holds it; the message names it.
        InputError: its file system has no locks.
        CorruptError: the lock's file is a link, and what it leads to would be overwritten.
    """
    path = folder / name
    with writing(folder):
        try:
            file = open(path, "ab+", buffering=0, opener=_unlinked)  # noqa: SIM115
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            raise CorruptError(f"{path}: a link or a pipe; remove it") from None
    with file:
        if not hold(file.fileno(), folder, wait):
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "another process"
            raise LockedError(
                f"{folder} is in use by {owner}; wait for it, or choose another folder"
            )
        with suppress(OSError):  # who holds it is for others to read; a full disk may lack it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _unlinked(path: str, flags: int) -> int:
    """Open a file, never through a link, and never wait for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def hold(handle: int, folder: Path, wait: bool) -> bool:
    """Lock an open file or folder until it is closed; return False if another process holds it.

    Args:
        handle: of the open file.
        folder: what is locked, as the user knows it.
        wait: stand in line behind whoever holds it.

    Raises:
        InputError: its file system has no locks, as some network shares.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be locked ({error.strerror}), so two processes could spoil it; "
            "use a folder on a local disk, or mount the share with locks"
        ) from None
    return True


@contextmanager
def filled_aside(place: Path, new: Path, old: Path) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends well, it takes the place of another.

    When the block raises, all is as it was; a kill leaves `new`, and `old` as `swap_in` says.

    Args:
        place: where the folder is to be.
        new: where it is filled, in the same folder as `place`.
        old: see `swap_in`.
    """
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in (*new.rglob("*"), new):
            flush(path)
        swap_in(new, place, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def swap_in(new: Path, place: Path, old: Path) -> None:
    """Put a finished folder in the place of another, which is then where the new one was.

    At every moment the place holds one of the two, whole, where the system can exchange folders.
    Elsewhere there is nothing for a moment, in which the other is at `old`; it is removed then.
    """
    if not place.exists():
        os.rename(new, place)
    elif not _exchanged(new, place):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(place, old)
        os.rename(new, place)
        shutil.rmtree(old, ignore_errors=True)
    flush(place.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the system can."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    return False


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
