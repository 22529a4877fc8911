"""Collect a listing into `Pairs`: ids by content, captions cleaned, bad images set apart.

A `Source` holds the bytes of the images: a `Folder` of files, or `Packed` files with many images
in each. The path of a packed image says all that reading it takes, so that any process can:

    shards/000003.tar@1536+48213/dog.jpg    48,213 bytes from byte 1,536 on
    train.parquet@12.57/dog.jpg             row 57 of row group 12
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from crosstill import files, formats
from crosstill.data.pairs import Copy, HashedReader, Pairs, place, read_image, regular, unreadable
from crosstill.errors import DataError, ImageError, MissingError
from crosstill.images import Quarantine
from crosstill.types import Example, image_id

_SLICE = re.compile(r"(.+?)@(\d+)\+(\d+)/", re.DOTALL)
_ROW = re.compile(r"(.+?)@(\d+)\.(\d+)/", re.DOTALL)
GROUPS = 4  # decoded row groups that are kept, one for each thread that reads


class Entry(NamedTuple):
    """One image as a dataset lists it."""

    where: str  # "row 4", "images[3]": for messages
    path: str  # as `Source.read` finds it; of a file, relative to the folder of images
    captions: list[str]
    split: str | None  # None: to be drawn
    listed: bool = True  # by a file that must be right; False: met in a folder, and free to go


class ImageFile(NamedTuple):
    """The facts about an image that need no decoding."""

    image_id: str
    size: int  # bytes
    problem: str  # "" when all is well, "missing", or the reason for quarantine


class Source(Protocol):
    """Holder of the bytes of a dataset's images."""

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
        """A function to the bytes of an example's image; raises ImageError. It pickles."""
        ...

    def identify(self, paths: Sequence[str]) -> Mapping[str, ImageFile]:
        """Look at every path of the entries once."""
        ...


class Listing(NamedTuple):
    """The entries that a format's reader made, and the files that it could not even list."""

    name: str
    origin: Path  # the file or folder that lists the entries, for messages
    source: Source
    entries: list[Entry]  # in the order of the dataset
    notes: tuple[str, ...] = ()
    bad: tuple[ImageError, ...] = ()
    licence: str | None = None


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

    def identify(self, paths: Sequence[str]) -> dict[str, ImageFile]:
        distinct = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
            return dict(zip(distinct, pool.map(self._inspect, distinct), strict=True))

    def _inspect(self, path: str) -> ImageFile:
        size = 0
        try:
            full = place(self.root, path)
            size = full.stat().st_size
            problem = "" if size else "empty file"
            return ImageFile(files.digest_file(regular(full)), size, problem)
        except (FileNotFoundError, NotADirectoryError):
            return ImageFile("", 0, "missing")
        except (OSError, ValueError) as error:
            return ImageFile("", size, unreadable(error))


@dataclass(frozen=True)
class Packed:
    """Images in archives or tables under one folder; few may be files of their own.

    Attributes:
        base: the folder.
        column: of the images in Parquet.
        images: the facts about every image, by path; filled while the dataset is listed.
    """

    base: Path
    column: str = ""
    images: dict[str, ImageFile] = field(default_factory=dict)

    @property
    def root(self) -> None:
        return None

    @property
    def record(self) -> dict[str, Any]:
        return {"form": "packed", "root": str(self.base), "column": self.column}

    @property
    def read(self) -> Callable[[Example], bytes]:
        return partial(read_packed, self.base, self.column)

    def note(self, path: str, content: bytes) -> str:
        """Remember the facts about an image, and return its id."""
        image = ImageFile(image_id(content), len(content), "" if content else "empty file")
        self.images[path] = image
        return image.image_id

    def identify(self, paths: Sequence[str]) -> Mapping[str, ImageFile]:
        alone = [path for path in paths if path not in self.images]
        return self.images | Folder(self.base).identify(alone) if alone else self.images


def files_reader(record: Mapping[str, Any]) -> Callable[[Example], bytes]:
    """Make `Folder.read` again from the record of its source."""
    return Folder(Path(record["root"])).read


def packed_reader(record: Mapping[str, Any]) -> Callable[[Example], bytes]:
    """Make `Packed.read` again from the record of its source."""
    return Packed(Path(record["root"]), str(record["column"])).read


def slice_path(container: str, offset: int, size: int, name: str) -> str:
    """Return the path of an image that lies in a file as it is."""
    return f"{container}@{offset}+{size}/{name}"


def row_path(container: str, group: int, row: int, name: str) -> str:
    """Return the path of an image that is a cell of compressed Parquet."""
    return f"{container}@{group}.{row}/{name}"


def read_packed(base: Path, column: str, example: Example) -> bytes:
    """Read the bytes of an image inside a larger file under a folder.

    Raises:
        ImageError: the larger file has gone or is shorter now, or cannot be read.
    """
    path = example.path
    try:
        if match := _SLICE.match(path):
            return _slice(regular(base / match[1]), int(match[2]), int(match[3]))
        if match := _ROW.match(path):
            cells = _row_group(str(regular(base / match[1])), column, int(match[2]))
            return image_bytes(cells[int(match[3])].as_py()) or b""
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        raise ImageError(path, unreadable(error)) from None
    except IndexError:
        raise ImageError(path, "cannot be read (the table around it is shorter now)") from None
    return read_image(base, example)


def image_bytes(cell: Any) -> bytes | None:
    """Return the bytes in a table's cell, bare or, as Hugging Face keeps them, beside a path."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError("the file around it is shorter than it was")
    return content


@lru_cache(maxsize=GROUPS)
def _row_group(path: str, column: str, number: int) -> Any:
    """Decode the cells of one row group; neighbours are mostly read one after the other."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, metadata=_footer(path)) as file:
        return file.read_row_group(number, columns=[column], use_threads=False)[column]


@lru_cache(maxsize=64)
def _footer(path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def collect(listing: Listing, strict: bool = False) -> Pairs:
    """Identify the files, set bad ones apart, merge equal ones and draw the splits not given.

    Args:
        listing: the images of a dataset.
        strict: raise at the first image that would be quarantined.

    Raises:
        DataError: nothing is listed, or nothing of it can be used.
        MissingError: a listed file is not there.
        ImageError: with `strict`, the first image that cannot be used.
    """
    origin, source = listing.origin, listing.source
    if not listing.entries:
        raise DataError(f"{origin}: no images in it; give a dataset that lists some")
    collection = _Collection(Quarantine(strict))
    entries = [_clean(entry, collection.notes) for entry in listing.entries]
    images = source.identify([entry.path for entry in entries])
    _refuse_missing(origin, source.root, entries, images)
    for entry in entries:
        collection.add(entry, images[entry.path])
    if not collection.examples:
        raise DataError(
            f"{origin}: none of its {len(images)} images can be used, the first is "
            f"{collection.quarantine.rows[0]['path']}: {collection.quarantine.rows[0]['reason']}; "
            "check --images"
        )
    for error in listing.bad:
        collection.quarantine.add(error, error.size)
    bare = sum(not example.captions for example in collection.examples.values())
    collection.notes["photos without captions"] = bare
    return Pairs(
        listing.name,
        tuple(collection.examples.values()),
        collection.quarantine,
        source.record,
        HashedReader(source.read),
        source.root,
        tuple(f"{text}: {count}" for text, count in collection.notes.items() if count),
        copies=tuple(collection.copies),
    )


def _clean(entry: Entry, notes: Counter[str]) -> Entry:
    """Replace broken Unicode in captions, strip them and drop those without a visible character."""
    notes["captions with broken Unicode, each now a '?'"] += sum(
        formats.encodable(text) != text for text in entry.captions
    )
    kept = [text for text in map(formats.cleaned, entry.captions) if text]
    notes["empty captions left out"] += len(entry.captions) - len(kept)
    return entry._replace(captions=kept)


def _refuse_missing(
    origin: Path, root: Path | None, entries: Sequence[Entry], images: Mapping[str, ImageFile]
) -> None:
    """Refuse listed files that are not there: a wrong folder more often than a broken dataset."""
    missing = [e for e in entries if e.listed and images[e.path].problem == "missing"]
    if missing:
        first, folder = missing[0], root or Path()
        raise MissingError(
            f"{origin}, {first.where}: missing image file {folder / first.path}; {len(missing)} of "
            f"{len(entries)} are missing: check --images, or ask crosstill doctor",
            folder,
            entries,
            [entry.path for entry in missing],
        )


@dataclass
class _Collection:
    """Examples by image id, and the notes, copies and bad images on the way to them."""

    quarantine: Quarantine
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def add(self, entry: Entry, image: ImageFile) -> None:
        """Add an image, or merge its captions into an equal one, or set it apart."""
        notes, examples = self.notes, self.examples
        reason = image.problem or formats.unsupported(entry.path)
        if reason:
            self.quarantine.add(ImageError(entry.path, reason), image.size)
            return
        first = examples.get(image.image_id)
        if first is None:
            notes["images without a split, drawn 80/10/10 by content"] += entry.split is None
            split = entry.split or _draw_split(image.image_id)
            captions = tuple(entry.captions)
            examples[image.image_id] = Example(image.image_id, entry.path, captions, split)
            return
        self.copies.append(Copy(entry.path, entry.split or first.split, first.path, first.split))
        if entry.split in (None, first.split):
            notes["copies of an image, captions merged into the first"] += 1
            new = tuple(text for text in entry.captions if text not in first.captions)
            captions = first.captions + new
            examples[image.image_id] = Example(first.image_id, first.path, captions, first.split)
        else:
            notes["copies of an image in another split (a leak), left out"] += 1


def _draw_split(image_id: str) -> str:
    """Draw by content, so that a moved, renamed or added file changes no other image's split."""
    return {8: "val", 9: "test"}.get(int(image_id[-8:], 16) % 10, "train")
