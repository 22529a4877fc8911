"""Every exception that crosstill raises on purpose.

    CrosstillError              catch this to catch them all
    ├── InputError              the user's mistake: the command line exits with 2
    │   ├── ConfigError         an option, a key of a TOML file, a name that does not exist
    │   ├── DataError           a dataset: which file, which row
    │   │   └── MissingError    listed image files that are not there
    │   ├── ImageError          one image that cannot be read: path and reason
    │   │   └── ChangedError    an image whose bytes are no longer those that were listed
    │   ├── ModelError          a teacher or student folder that does not load
    │   ├── MismatchError       two artefacts that do not belong together
    │   └── LockedError         a folder that another process is using
    └── RunError                the work failed: the command line exits with 1
        ├── CorruptError        a file whose checksum or format is wrong
        ├── DiskFullError       no room for what was to be written
        ├── ExportError         an export that is not what the student is
        └── NonFiniteError      a loss became NaN or infinite

Every message is one line that says what was wrong, where, and what to do about it.
"""

import errno
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class CrosstillError(Exception):
    """Any error that crosstill raises on purpose; `exit_code` is the command line's."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # a file's name may hold a new line, or worse


class InputError(CrosstillError):
    """The caller gave something that cannot work."""

    exit_code = 2


class ConfigError(InputError):
    """An option or a configuration key that does not exist or cannot have that value."""


class DataError(InputError):
    """A dataset that cannot be read as asked; the message names the file and the row."""


class MissingError(DataError):
    """Listed image files that are not there.

    Attributes:
        root: the folder in which they were looked for.
        listed: every entry of the dataset, as `crosstill.data.collection` has it.
        missing: the paths that are not there, as they are listed.
    """

    def __init__(
        self, message: str, root: Path, listed: Sequence[Any], missing: Sequence[str]
    ) -> None:
        super().__init__(message)
        self.root, self.listed, self.missing = root, listed, missing


class ImageError(InputError):
    """One image that cannot be decoded.

    Attributes:
        path: where the image came from, as the caller named it.
        reason: a short, stable text such as "truncated" or "not an image".
        size: of its file in bytes, where that is known without reading it; else 0.
    """

    def __init__(self, path: str, reason: str, size: int = 0) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.size = size


class ChangedError(ImageError):
    """An image whose bytes are no longer those that were hashed when it was listed."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "changed since it was listed")


class ModelError(InputError):
    """A teacher or student that does not load, or that lacks something it needs."""


class MismatchError(InputError):
    """Two artefacts that were not made for each other, such as a run and a cache."""


class LockedError(InputError):
    """A folder that another live process holds; the message names that process."""


class RunError(CrosstillError):
    """The input was fine and the work failed."""


class CorruptError(RunError):
    """A file whose checksum, size or format is not what was written."""


class DiskFullError(RunError):
    """No room for what was to be written; `crosstill.files.writing` raises it.

    Attributes:
        code: ENOSPC, EDQUOT or EFBIG of `errno`.
    """

    def __init__(self, message: str, code: int = errno.ENOSPC) -> None:
        super().__init__(message)
        self.code = code


class ExportError(RunError):
    """An export that failed its gate; the message gives the figures, and nothing was kept."""


class NonFiniteError(RunError):
    """A loss became NaN or infinite; the message says where the state was saved."""


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Make the error of a name that does not exist; it gives the nearest name and all known ones.

    >>> str(unknown("loss", "rdk", ["rkd", "contrastive"]))
    "no loss named 'rdk'; did you mean 'rkd'? Known: contrastive, rkd"
    """
    names = sorted(known)
    return ConfigError(
        f"no {kind} named {name!r}{did_you_mean(name, names)} Known: {', '.join(names)}"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the known name that is nearest to a mistyped one, between two parts of a message.

    >>> did_you_mean("rdk", ["rkd", "contrastive"]), did_you_mean("x", ["rkd"])
    ("; did you mean 'rkd'?", ';')
    """
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ";"


def printable(text: str) -> str:
    r"""Write any text on one line, harmless to a terminal: control characters, stray bytes escaped.

    >>> printable("a\nb")
    'a\\nb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
