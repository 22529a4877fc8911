"""`Pairs`: a named set of images with captions and splits, and a way to read their bytes."""

from __future__ import annotations

import logging
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from crosstill import files, formats
from crosstill.errors import ChangedError, DataError, ImageError
from crosstill.images import Quarantine
from crosstill.types import Example, image_id

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {
    "restval": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}


class Copy(NamedTuple):
    """A listed image whose bytes are those of one that was listed before.

    In the same split its captions were merged into the first; in another one it was left out.
    """

    path: str
    split: str
    first: str  # path of the first
    first_split: str


@dataclass(frozen=True)
class Pairs:
    """The images of a dataset with their captions, each image once; one may have no caption.

    Attributes:
        name: for people; no part of the identity.
        examples: one an image, in the order of the dataset.
        quarantine: what was listed and cannot be used; decoding adds to it later.
        source: a JSON-able record from which `data.reader` makes `read` again.
        read: the bytes of an example's file. Raises ImageError when it has gone or changed.
        root: the folder of the images; None when they are rendered.
        notes: what a person should know: left-out captions, duplicates, drawn splits.
        licence: of photos and captions, as the card beside them says it or as it was given.
        copies: what was listed and has the bytes of another image.
    """

    name: str
    examples: tuple[Example, ...]
    quarantine: Quarantine
    source: dict[str, Any]
    read: Callable[[Example], bytes]
    root: Path | None = None
    notes: tuple[str, ...] = ()
    licence: str | None = None
    copies: tuple[Copy, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def splits(self) -> dict[str, int]:
        """Images in each split that has any: train, val, test."""
        counts = Counter(example.split for example in self.examples)
        return {name: counts[name] for name in SPLITS if counts[name]}

    def split(self, name: str) -> Pairs:
        """Return the examples of one split.

        Raises:
            DataError: no image is in it; the message names the splits that have some.
        """
        examples = tuple(example for example in self.examples if example.split == name)
        if not examples:
            counts = ", ".join(f"{split} ({count})" for split, count in self.splits.items())
            raise DataError(f"{self.name}: split {name!r} has no images; there are {counts}")
        return replace(self, examples=examples)

    def captioned(self) -> Pairs:
        """Return the photos that have captions, for what needs pairs; log how many are left out.

        Raises:
            DataError: none has any.
        """
        examples = tuple(example for example in self.examples if example.captions)
        bare = len(self) - len(examples)
        if not bare:
            return self
        if not examples:
            raise DataError(
                f"{self.name}: no captions in it, and they are needed here; give its photos "
                "captions (photos alone serve `crosstill cache` with a dual encoder)"
            )
        log.info("%s: %s photos without captions left out", self.name, f"{bare:,}")
        return replace(self, examples=examples)

    def digest(self) -> str:
        """Hash the content: ids, captions, splits. Order, names and places do not count."""
        rows = [[e.image_id, sorted(e.captions), e.split] for e in self.examples]
        return files.digest_json(sorted(rows))


@dataclass(frozen=True)
class HashedReader:
    """Reads images by id: files are hashed when they are listed, and again whenever they are read.

    Between the two anything may happen to a file, and features must never get another photo's id.

    Attributes:
        read: the bytes of an example's file, whatever they are by now.
    """

    read: Callable[[Example], bytes]

    def __call__(self, example: Example) -> bytes:
        """Return the bytes whose SHA-256 is the example's id.

        Raises:
            ChangedError: there are other bytes.
            ImageError: it has gone, or cannot be read.
        """
        content = self.read(example)
        if image_id(content) != example.image_id:
            raise ChangedError(example.path)
        return content


def split_name(text: str, where: str) -> str:
    """Return train, val or test for a name in use, such as restval; `where` is for the error."""
    name = SPLIT_NAMES.get(text.strip().lower())
    if name is None:
        raise DataError(f"{where}: unknown split {text!r}; use {', '.join(SPLITS)}")
    return name


def read_text(path: Path) -> str:
    """Read a listing, without a byte-order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8; the message names the line.
    """
    try:
        return formats.decode(regular(path).read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_licence(folder: Path) -> str | None:
    """Read the `license` in the front matter of a folder's README.md; None if there is none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^licen[sc]e:\s*(\S.*?)\s*$", front[1], re.MULTILINE) if front else None
    return line[1].strip("'\"") if line else None


def read_image(root: Path, example: Example) -> bytes:
    """Read the bytes of an image file under a folder.

    Raises:
        ImageError: it has gone since the dataset was opened, or cannot be read.
    """
    try:
        return regular(place(root, example.path)).read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(example.path, unreadable(error)) from None


def place(root: Path, listed: str) -> Path:
    """Return where a listed file is: macOS may have written its name in another Unicode form."""
    path = root / listed
    if not listed.isascii() and not path.exists():
        for form in ("NFC", "NFD"):
            other = root / unicodedata.normalize(form, listed)
            if other.exists():
                return other
    return path


def regular(path: Path) -> Path:
    """Refuse what is no ordinary file before it is opened: a FIFO would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path


def unreadable(error: OSError | ValueError) -> str:
    """Return the reason that an `ImageError` gives for a file that the system refuses."""
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"
