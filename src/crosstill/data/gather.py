"""From what a dataset lists to examples: ids by content, captions cleaned, nothing lost unsaid."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from crosstill import files, formats
from crosstill.data.base import Copy, HashedReader, Pairs, place, read_image, regular, unreadable
from crosstill.errors import DataError, ImageError, MissingError
from crosstill.formats import encodable
from crosstill.images import Quarantine
from crosstill.types import Example


class Entry(NamedTuple):
    """One image as a dataset lists it."""

    where: str  # "row 4", "images[3]": for messages
    path: str  # as `Source.read` finds it; of a file, relative to the folder of images
    captions: list[str]
    split: str | None  # None: to be drawn
    listed: bool = True  # by a file that must be right; False: met in a folder, and free to go


class File(NamedTuple):
    """What is known of an image before it is decoded."""

    image_id: str
    size: int  # bytes
    problem: str  # "" when all is well, "missing", or the reason for quarantine


class Source(Protocol):
    """What holds the bytes of a dataset's images."""

    @property
    def root(self) -> Path | None:
        """The folder of the image files, if they are files."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """A JSON-able record from which `data.reader` makes `read` again."""
        ...

    @property
    def read(self) -> Callable[[Example], bytes]:
        """The bytes of an example's image; raises ImageError. It pickles."""
        ...

    def identify(self, paths: Sequence[str]) -> Mapping[str, File]:
        """Look at every path of the entries once."""
        ...


@dataclass(frozen=True)
class Folder:
    """Images that are files under one folder."""

    root: Path

    @property
    def record(self) -> dict[str, Any]:
        return {"form": "files", "root": str(self.root)}

    @property
    def read(self) -> Callable[[Example], bytes]:
        return partial(read_image, self.root)

    def identify(self, paths: Sequence[str]) -> dict[str, File]:
        distinct = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
            return dict(zip(distinct, pool.map(self._inspect, distinct), strict=True))

    def _inspect(self, path: str) -> File:
        size = 0
        try:
            full = place(self.root, path)
            size = full.stat().st_size
            problem = "" if size else "empty file"
            return File(files.digest_file(regular(full)), size, problem)
        except (FileNotFoundError, NotADirectoryError):
            return File("", 0, "missing")
        except (OSError, ValueError) as error:
            return File("", size, unreadable(error))


@dataclass
class _Gathered:
    """Examples by image id, and what was met on the way to them."""

    quarantine: Quarantine
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)


def gather(
    name: str,
    origin: Path,
    source: Source,
    entries: Sequence[Entry],
    strict: bool,
    bad: Sequence[ImageError] = (),
) -> Pairs:
    """Identify the files, set bad ones apart, merge equal ones and draw the splits not given.

    Args:
        name: of the dataset.
        origin: the file or folder that lists the entries, for messages.
        source: what holds the images, such as a `Folder`.
        entries: in the order of the dataset.
        strict: raise at the first image that would be quarantined.
        bad: what the reader of the dataset could not use, for the quarantine.

    Raises:
        DataError: nothing is listed, or nothing has a caption.
        MissingError: a listed file is not there.
        ImageError: with `strict`, the first image that cannot be used.
    """
    if not entries:
        raise DataError(f"{origin}: no images in it; give a dataset that lists some")
    gathered = _Gathered(Quarantine(strict))
    entries = [_clean(entry, gathered.notes) for entry in entries]
    if not any(entry.captions for entry in entries):
        raise DataError(
            f"{origin}: no captions in it, the first image without one is {entries[0].path} "
            f"({entries[0].where}); give every image at least one{_hint(bad)}"
        )
    found = source.identify([entry.path for entry in entries])
    _refuse_missing(origin, source.root, entries, found)
    for entry in entries:
        _add(entry, found[entry.path], gathered)
    if not gathered.examples:
        raise DataError(
            f"{origin}: none of its {len(found)} images can be used, the first is "
            f"{gathered.quarantine.rows[0]['path']}: {gathered.quarantine.rows[0]['reason']}; "
            "check --images"
        )
    for error in bad:
        gathered.quarantine.add(error, error.size)
    return Pairs(
        name,
        tuple(gathered.examples.values()),
        gathered.quarantine,
        source.record,
        HashedReader(source.read),
        source.root,
        tuple(f"{text}: {count}" for text, count in gathered.notes.items() if count),
        copies=tuple(gathered.copies),
    )


def _hint(bad: Sequence[ImageError]) -> str:
    """Name what a dataset without captions held besides its images."""
    return f"; {len(bad)} of its files cannot be used, the first is {bad[0]}" if bad else ""


def _clean(entry: Entry, notes: Counter[str]) -> Entry:
    captions = []
    for text in entry.captions:
        whole = encodable(text)
        notes["captions with broken Unicode, each now a '?'"] += whole != text
        captions.append(whole.strip())
    kept = [text for text in captions if any(map(_visible, text))]
    notes["empty captions left out"] += len(captions) - len(kept)
    return entry._replace(captions=kept)


def _visible(character: str) -> bool:
    return character.isprintable() and not character.isspace()


def _refuse_missing(
    origin: Path, root: Path | None, entries: Sequence[Entry], found: Mapping[str, File]
) -> None:
    """A listed file that is not there means a wrong folder more often than a broken dataset."""
    missing = [e for e in entries if e.listed and found[e.path].problem == "missing"]
    if missing:
        first, folder = missing[0], root or Path()
        raise MissingError(
            f"{origin}, {first.where}: missing image file {folder / first.path}; {len(missing)} of "
            f"{len(entries)} are missing: check --images, or ask crosstill doctor",
            folder,
            entries,
            [entry.path for entry in missing],
        )


def _add(entry: Entry, file: File, gathered: _Gathered) -> None:
    notes, examples = gathered.notes, gathered.examples
    reason = file.problem or formats.unsupported(entry.path)
    reason = reason or ("" if entry.captions else "no caption")
    if reason:
        gathered.quarantine.add(ImageError(entry.path, reason), file.size)
        return
    known = examples.get(file.image_id)
    if known is None:
        notes["images without a split, drawn 80/10/10 by content"] += entry.split is None
        split = entry.split or _draw_split(file.image_id)
        captions = tuple(entry.captions)
        examples[file.image_id] = Example(file.image_id, entry.path, captions, split)
        return
    gathered.copies.append(Copy(entry.path, entry.split or known.split, known.path, known.split))
    if entry.split in (None, known.split):
        notes["copies of an image, captions merged into the first"] += 1
        examples[file.image_id] = _merged(known, entry.captions)
    else:
        notes["copies of an image in another split (a leak), left out"] += 1


def _merged(known: Example, captions: Sequence[str]) -> Example:
    new = tuple(text for text in captions if text not in known.captions)
    return Example(known.image_id, known.path, known.captions + new, known.split)


def _draw_split(image_id: str) -> str:
    """By content, so that a moved, renamed or added file changes no other image's split."""
    return {8: "val", 9: "test"}.get(int(image_id[-8:], 16) % 10, "train")
