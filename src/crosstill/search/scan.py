"""Scan a folder for photos, and read and decode them in several threads.

Names are `str` with surrogate escapes, so that any bytes a disk holds come through. What is not
an ordinary file, cannot be read or leads out of the folder is reported and passed over.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

import numpy as np

from crosstill import decoding, formats, pixels
from crosstill.errors import DataError, ImageError
from crosstill.pixels import Preprocess

MAX_BYTES = 2**29  # of one photo's file: what a worker is ready to hold
CAPTION = 10_000  # characters of a caption that are kept
MOMENT = 2_000_000_000  # ns: the coarsest clock of a file system in use
AHEAD = 24  # photos that each worker may be ahead: 4 MB at 224 pixels

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Stamp(NamedTuple):
    """Sizes and times of a photo and its caption: equal ones need not be read again.

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


class KnownFile(NamedTuple):
    """The content of a file when it was last read.

    Attributes:
        stamp: its size and times, and its caption's.
        read_ns: when it was read.
        sha: SHA-256 of its bytes; None where they could not be read.
        caption: of its text file.
        reason: why it is no photo; "" where it is one.
    """

    stamp: Stamp
    read_ns: int
    sha: bytes | None
    caption: str = ""
    reason: str = ""

    def still(self, stamp: Stamp) -> bool:
        """Tell whether a file with this stamp is certain to be the same.

        A file written in the very moment in which it was read may have changed without a trace.
        """
        newest = max(stamp.ctime_ns, stamp.caption_ctime_ns)
        return self.stamp == stamp and newest + MOMENT < self.read_ns


@dataclass
class Scan:
    """The photos of a folder, and the files that are left out.

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
        waiting += [
            name for name in _sort_entries(scan, root, folder, entries) if root / name != skip
        ]
    scan.photos = dict(sorted(scan.photos.items()))
    return scan


def no_photos(root: Path, scan: Scan) -> DataError:
    """Make the error for a folder without photos; a file that was left out serves as a hint."""
    hint = next((f" ({name}: {why})" for name, why in scan.problems.items()), "")
    return DataError(f"{root}: no photo in it{hint}; give a folder of photos")


def count_emptied(before: Iterable[str], left: Iterable[str]) -> dict[str, int]:
    """Count the files of each folder of which none is left; "." is the whole.

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
    """Return the folders that a file is in, the outermost first."""
    return [str(folder) for folder in reversed(PurePath(name).parents)]


def read_photo(root: Path, name: str) -> bytes:
    """Read all bytes of a photo's file.

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
    """Read up to `CAPTION` characters of the text file beside a photo; "" if it is unreadable."""
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


@dataclass(frozen=True)
class Read:
    """One photo that was read, and its pixels where they are needed."""

    name: str
    known: KnownFile
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Reader:
    """Reads and decodes photos of one folder.

    Attributes:
        root: the folder.
        preprocess: how the student wants its images.
        encoded: SHA-256 of contents that need no pixels. It may grow while photos are read.
        refused: why a content is no photo, by its SHA-256.
    """

    root: Path
    preprocess: Preprocess
    encoded: Container[bytes]
    refused: Mapping[bytes, str]

    def read(self, name: str, stamp: Stamp) -> Read:
        """Read one photo; an error becomes its reason."""
        began = time.time_ns()
        try:
            data = read_photo(self.root, name)
        except ImageError as error:
            return Read(name, KnownFile(stamp, began, None, reason=error.reason), None)
        sha = hashlib.sha256(data).digest()
        caption = read_caption(self.root, name) if stamp.caption_size >= 0 else ""
        reason, decoded = self.refused.get(sha, ""), None
        if sha not in self.encoded and not reason:
            try:
                decoded = pixels.load(data, name, self.preprocess)
            except ImageError as error:
                reason = error.reason
        return Read(name, KnownFile(stamp, began, sha, caption, reason), decoded)


def ahead(
    read: Callable[[str, Stamp], Read], photos: Mapping[str, Stamp], workers: int
) -> Iterator[Read]:
    """Yield all photos in their order, each read ahead by one of the workers."""
    return decoding.ahead(lambda photo: read(*photo), photos.items(), AHEAD * workers, workers)


def grouped(reads: Iterator[Read], size: int) -> Iterator[list[Read]]:
    """Yield reads in groups of this size; the last group may be smaller."""
    while group := list(islice(reads, size)):
        yield group


def _sort_entries(
    scan: Scan, root: Path, folder: str, entries: list[os.DirEntry[str]]
) -> Iterator[str]:
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
        status = "a link to a folder, not entered" if link_to_folder else _status(root, entry)
        if isinstance(status, str):
            scan.problems[name] = status
            continue
        if unsupported:
            scan.problems[name], scan.sizes[name] = unsupported, status.st_size
            continue
        caption = next(filter(None, map(texts.get, formats.sidecars(entry.name))), None)
        text = _status(root, caption) if caption else None
        scan.photos[name] = Stamp.of(status, text if isinstance(text, os.stat_result) else None)


def _is_folder(entry: os.DirEntry[str], follow_links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError:  # a link to itself, or gone
        return False


def _status(root: Path, entry: os.DirEntry[str]) -> os.stat_result | str:
    """Return the status of an ordinary file, or why the entry is none."""
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
