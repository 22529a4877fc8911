"""Reading of artefacts that a stranger may have made: names, records and arrays in them.

A bundle, an index, a cache and a run are folders. What stands in one is taken for what the format
says or refused with a `CorruptError`: a name never leads out of the folder, a link is not followed,
a record has the types of its model, an array is as large as its file.
"""

import errno
import re
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from crosstill import files
from crosstill.errors import CorruptError, CrosstillError

ANEW = "do not use it, or make it anew"
MAX_ARCHIVE = 1 << 28  # bytes of all arrays in an .npz
# kinds of finished caches: the file of the header → the class that opens it
CACHES = {
    "scores.json": "crosstill.fusion.scores:ScoreCache",
    "cache.json": "crosstill.cache.format:Cache",
}

_DAMAGED: tuple[type[Exception], ...] = (
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError),
    *(OverflowError, MemoryError, SyntaxError),
    tokenize.TokenError,  # numpy reads an array's header as Python's tokens
    *(RuntimeError, zipfile.BadZipFile, zlib.error),  # also RecursionError, NotImplementedError
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("not the name of a file within it")
    return name


Name = Annotated[str, AfterValidator(_plain)]  # of a file in the folder itself
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digests = dict[Name, Sha256]  # of files, by their names
Identity = dict[str, str]


def is_cache(folder: str | Path) -> bool:
    """Tell whether a folder holds a finished cache of any kind."""
    return any((Path(folder) / header).is_file() for header in CACHES)


class Record(BaseModel):
    """A sealed JSON record; what its model does not name is kept and not looked at."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def read(path: Path, kind: type[Model], versions: set[int]) -> Model:
    """Read a sealed record and check the types of all that is used of it.

    Raises:
        CorruptError: it is a link, damaged, of an unknown format, or a field is not what it
            should be; the message names the field.
    """
    value = files.read_sealed(member(path.parent, path.name), versions)
    return checked(path, kind, value)


def checked(path: Path, kind: type[Model], value: Any) -> Model:
    """Check a record that was read from `path` against its model.

    Raises:
        CorruptError: a field is not what it should be.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"] if part != "[key]")
        raise CorruptError(f"{path}: {where}: {first['msg']}; {ANEW}") from None


def member(folder: Path, name: str) -> Path:
    """Return the path of a file or folder of an artefact; the name may come from a stranger.

    What is not there is left to the caller.

    Raises:
        CorruptError: the name leads elsewhere, or what is there is a link or no file or folder.
    """
    if not _NAME.fullmatch(name) and not (name.startswith(".") and _NAME.fullmatch(name[1:])):
        raise CorruptError(f"{folder}: names a file {name[:100]!r}, which is not within it; {ANEW}")
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = "a link, which is not followed" if stat.S_ISLNK(mode) else "no ordinary file"
        raise CorruptError(f"{path}: {what}; put the file itself there")
    return path


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files of a folder, by their names: what `check_files` compares."""
    return {name: files.digest_file(folder / name) for name in names}


def check_files(folder: Path, digests: Mapping[Any, str]) -> None:
    """Compare files of a folder with their SHA-256.

    Raises:
        CorruptError: one is missing, a link or damaged, or its name leads elsewhere.
    """
    for problem in problems(folder, digests):
        raise problem


def problems(
    folder: Path, digests: Mapping[Any, str], remedy: str = files.REMEDY
) -> Iterator[CorruptError]:
    """Yield an error for each file that is missing, a link or damaged, or whose name leads out."""
    for name, digest in digests.items():
        try:
            files.check_digest(member(folder, name), digest, remedy)
        except CorruptError as error:
            yield error


def array(path: Path, kinds: str, ndim: int, mmap: bool = False) -> np.ndarray:
    """Read an .npy file that is exactly as long as its header says.

    Args:
        path: the file.
        kinds: letters of numpy's `dtype.kind` that are allowed, such as "f" or "iu".
        ndim: number of axes.
        mmap: map it instead of reading it.

    Raises:
        CorruptError: it is a link, damaged, or another array than it should be.
    """
    member(path.parent, path.name)
    with readable(path):
        with path.open("rb") as file:
            _check_header(file, path.stat().st_size, kinds, ndim)
        out: np.ndarray = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
        return out


def archive(path: Path, kinds: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, no more of them and no larger than is sensible.

    Args:
        path: the file.
        kinds: by the name of each array: letters of `dtype.kind` that are allowed, and the axes.

    Raises:
        CorruptError: it is a link, damaged, or holds something else.
    """
    member(path.parent, path.name)
    with readable(path), zipfile.ZipFile(path) as held:
        known = {entry.filename: entry for entry in held.infolist()}
        total = sum(entry.file_size for entry in known.values())
        if total > MAX_ARCHIVE:
            raise ValueError(f"{files.amount(total)} unpacked, {files.amount(MAX_ARCHIVE)} at most")
        out = {}
        for name, (allowed, ndim) in kinds.items():
            entry = known[f"{name}.npy"]
            with held.open(entry) as file:
                _check_header(file, entry.file_size, allowed, ndim)
            with held.open(entry) as file:
                out[name] = np.lib.format.read_array(file, allow_pickle=False)
        return out


def _check_header(file: IO[bytes], size: int, kinds: str, ndim: int) -> None:
    version = np.lib.format.read_magic(file)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in header:
        raise ValueError(f"an array of version {version}")
    shape, _, dtype = header[version](file)
    if (
        dtype.kind not in kinds
        or dtype.hasobject
        or len(shape) != ndim
        or min(shape, default=0) < 0
    ):
        raise ValueError(f"an array {shape} of {dtype}")
    length = dtype.itemsize
    for side in shape:  # as Python's integers, which do not overflow
        length *= side
    if file.tell() + length != size:
        raise ValueError(f"an array {shape} of {dtype} in {size} bytes")


@contextmanager
def readable(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a library raises while it reads a file into one line that names the file.

    Raises:
        CorruptError: in place of the usual errors of damaged data, and of `kinds`.
    """
    expected: tuple[type[Exception], ...] = (*_DAMAGED, OSError, *kinds)
    try:
        yield
    except expected as error:
        # of the disk, and not of a file that asks for a place before its start
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise CorruptError(f"{path}: not readable ({text}); {ANEW}") from None


@contextmanager
def foreign(path: Path, complaint: str, advice: str = "export it anew") -> Iterator[None]:
    """Turn whatever another library raises over a file into one line that names the file.

    Args:
        path: the file.
        complaint: what it is not, such as "not a tokenizer".
        advice: what to do about it.

    Raises:
        CorruptError: in place of all that the block raises.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CrosstillError):
        raise
    except BaseException as error:  # no common base, and a panic of Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = " ".join(str(error).split())[:160]
        raise CorruptError(f"{path}: {complaint} ({line}); {advice}") from None
