"""Which photos a folder holds, and how one is read without ever waiting for a pipe.

Names are `str` with surrogate escapes, so that any bytes a disk holds come through. What is not
an ordinary file, cannot be read or leads out of the folder is reported and passed over.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from crosstill import formats
from crosstill.errors import DataError, ImageError

MAX_BYTES = 2**29  # of one photo's file: what a worker is ready to hold
CAPTION = 10_000  # characters of a caption that are kept

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Stamp(NamedTuple):
    """What tells without reading that a photo and its caption are as they were.

    Attributes:
        size: of the photo, in bytes.
        mtime_ns: when it was last written, unless a program has set that back.
        ctime_ns: when anything of it last changed, which no program can set.
        caption_size, caption_mtime_ns, caption_ctime_ns: the same of its text file; -1 where it
            has none.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    caption_size: int = -1
    caption_mtime_ns: int = -1
    caption_ctime_ns: int = -1

    @classmethod
    def of(cls, photo: os.stat_result, caption: os.stat_result | None) -> Stamp:
        """Take the stamp of a photo and of its text file."""
        files = (photo,) if caption is None else (photo, caption)
        return cls(*(n for f in files for n in (f.st_size, f.st_mtime_ns, f.st_ctime_ns)))


@dataclass
class Scan:
    """What a walk found.

    Attributes:
        photos: by name relative to the folder.
        problems: why something was passed over, by its relative name.
        sizes: in bytes, of those of `problems` where it is known.
        closed: relative names of folders that could not be listed: what they hold is unknown.
    """

    photos: dict[str, Stamp] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)


def walk(root: Path, skip: Path | None = None) -> Scan:
    """Find all photos below a folder, hidden ones aside, in the order of their names.

    What a name means is as in datasets: see `formats`.

    Links to files are followed where they stay inside the folder, links to folders never.

    Args:
        root: the folder, its links resolved.
        skip: a folder that is not entered: the index itself, where it lies among the photos.

    Raises:
        DataError: the folder itself cannot be listed.
    """
    scan, waiting = Scan(), [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = [entry for entry in listing if not formats.hidden(entry.name)]
        except OSError as error:
            if not folder:
                raise DataError(f"{root}: {error.strerror}; give a folder of photos") from None
            scan.problems[folder] = error.strerror or str(error)
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                scan.closed.append(folder)
            continue
        waiting += [name for name in _sort(scan, root, folder, entries) if root / name != skip]
    scan.photos = dict(sorted(scan.photos.items()))
    return scan


def nothing(root: Path, scan: Scan) -> DataError:
    """What to say of a folder without photos; something that was passed over serves as a hint."""
    hint = next((f" ({name}: {why})" for name, why in scan.problems.items()), "")
    return DataError(f"{root}: no photo in it{hint}; give a folder of photos")


def emptied(before: Iterable[str], left: Iterable[str]) -> dict[str, int]:
    """Count what each folder held of which nothing is left; "." is the whole.

    Args:
        before: names of files; one that is in no such folder is not counted.
        left: those that are left.

    Returns:
        Counts by folder, the outermost ones alone.
    """
    alive = {folder for name in left for folder in _folders(name)}
    outermost = (next((f for f in _folders(name) if f not in alive), None) for name in before)
    return Counter(folder for folder in outermost if folder is not None)


def _folders(name: str) -> list[str]:
    """The folders that a file is in, the outermost first."""
    return [str(folder) for folder in reversed(PurePath(name).parents)]


def read(root: Path, name: str) -> bytes:
    """All bytes of a photo's file.

    Raises:
        ImageError: it cannot be read, is no ordinary file or is larger than `MAX_BYTES`.
    """
    try:
        with _open(root / name) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ImageError(name, f"larger than {MAX_BYTES >> 20} MB")
            return file.read()
    except OSError as error:
        raise ImageError(name, _why(error)) from None


def read_caption(root: Path, name: str) -> str:
    """The first `CAPTION` characters of the text file beside a photo; "" where it is unreadable."""
    for text in formats.sidecars(name):
        try:
            with _open(root / text) as file:
                data = file.read(4 * CAPTION + 3)
        except FileNotFoundError:
            continue
        except OSError:
            return ""
        return data.decode("utf-8-sig", "replace")[:CAPTION].strip()
    return ""


def _sort(scan: Scan, root: Path, folder: str, entries: list[os.DirEntry[str]]) -> Iterator[str]:
    """Note the photos among the entries of a folder; give the folders to enter."""
    texts = {e.name: e for e in entries if formats.ending(e.name) == ".txt"}
    for entry in entries:
        name = os.path.join(folder, entry.name)
        if _is_folder(entry, follow_links=False):
            yield name
            continue
        link_to_folder = _is_folder(entry, follow_links=True)
        unsupported = formats.unsupported(entry.name)
        known = unsupported or formats.ending(entry.name) in formats.PHOTOS
        if not link_to_folder and not known:
            continue
        found = "a link to a folder, not entered" if link_to_folder else _look(root, entry)
        if isinstance(found, str):
            scan.problems[name] = found
            continue
        if unsupported:
            scan.problems[name], scan.sizes[name] = unsupported, found.st_size
            continue
        caption = next(filter(None, map(texts.get, formats.sidecars(entry.name))), None)
        text = _look(root, caption) if caption else None
        scan.photos[name] = Stamp.of(found, text if isinstance(text, os.stat_result) else None)


def _is_folder(entry: os.DirEntry[str], follow_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError:  # a link to itself, or gone
        return False


def _look(root: Path, entry: os.DirEntry[str]) -> os.stat_result | str:
    """The status of an ordinary file, or why the entry is none."""
    try:
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if os.path.commonpath((target, root)) != str(root):
                return "a link out of the folder, not followed"
        status = entry.stat()
    except FileNotFoundError:
        return "a link to nothing" if entry.is_symlink() else "vanished"
    except OSError as error:
        return _why(error)
    return status if stat.S_ISREG(status.st_mode) else _kind(status)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK, opening a pipe that has just taken the file's place would wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, _kind(status))
        yield file


def _kind(status: os.stat_result) -> str:
    return f"not a file but {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}"


def _why(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "vanished"
    return error.strerror or str(error)
