"""Find the image files that a listing names and that are not where it says.

The folders at hand are walked once. A file is taken for the listed one when its name is the same,
capitals and Unicode forms aside, and of several of that name the one whose folders agree furthest.
Where there is none, the number of a caption behind the name (a.jpg#0, as in Flickr8k.token), the
escapes of a URL (%20) and another ending of JPEG (.jpeg for .jpg) are set right, in this order.
"""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from crosstill import formats
from crosstill.errors import DataError, MissingError, printable

MOST = 300_000  # files that are looked at
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
SHOWN = 3  # paths of a kind that the text shows; JSON has all

_KINDS = {
    "folder": "lie in another folder",
    "case": "are written with other capitals",
    "unicode": "are written in another Unicode form, as macOS writes accents",
    "number": "are listed with the number of a caption, as a.jpg#0",
    "escapes": "are listed as in a URL, with %20 and the like",
    "ending": "have another ending, .jpg, .jpeg, .jpe or .jfif",
    "backslash": "are listed with backslashes, as Windows writes them",
    "absolute": "are listed with the path of another machine",
    "ambiguous": "are one of several files of that name",
    "nowhere": "were not found",
}


@dataclass(frozen=True)
class Lost:
    """A listed file that is not where the listing says.

    Attributes:
        path: as it is listed.
        kind: a key of `_KINDS`.
        at: where it is; None when it was not found, or when several could be meant.
    """

    path: str
    kind: str
    at: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The search for the files of a listing.

    Attributes:
        source: the dataset, as it was given.
        error: what `data.open` said.
        lost: every file that is missing.
        looked_in: the folders that were walked.
        files: how many files were seen there; `MOST` means that some were not.
        images: a folder for --images in which every listed file is; None if there is none.
    """

    source: str
    error: MissingError
    lost: Sequence[Lost]
    looked_in: Sequence[str]
    files: int
    images: str | None

    @property
    def command(self) -> str:
        """What to run next."""
        doctor = f"crosstill doctor {_quoted(self.source)} --images"
        if self.images is not None:
            return f"{doctor} {_quoted(self.images)}"
        if self._some_found:
            return f"{doctor} {_quoted(str(self.error.root))} --json"
        return f"{doctor} FOLDER, with the folder of the images"

    @property
    def _some_found(self) -> bool:
        """Whether a listed file is where it is listed, or was found elsewhere."""
        elsewhere = any(lost.at is not None for lost in self.lost)
        return elsewhere or len(set(self.error.missing)) < len({e.path for e in self.error.listed})

    @property
    def refusal(self) -> DataError:
        """Why the dataset cannot be opened, and what to run."""
        counted = f"{len(self.lost)} of {len(self.error.listed)} listed files are missing"
        return DataError(f"{self.source}: {counted}; run: {self.command}")

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "root": str(self.error.root),
            "listed": len(self.error.listed),
            "missing": [vars(lost) for lost in self.lost],
            "looked_in": list(self.looked_in),
            "files": self.files,
            "complete": self.files < MOST,
            "images": self.images,
            "command": self.command,
        }

    def text(self) -> str:
        """Describe it for people: how many of each kind, a few of them, and what to run."""
        missing, listed = f"{len(self.lost):,}", f"{len(self.error.listed):,}"
        cut = "" if self.files < MOST else ", no more were looked at"
        lines = [f"missing          {missing} of {listed} files below {_clean(self.error.root)}"]
        for kind, says in _KINDS.items():
            alike = [lost for lost in self.lost if lost.kind == kind]
            lines += [f"  {len(alike):,} {says}"] if alike else []
            for lost in alike[:SHOWN]:
                place = f" is {_clean(lost.at)}" if lost.at else ""
                lines.append(f"    {_clean(lost.path)}{place}")
        looked = ", ".join(map(_clean, self.looked_in))
        lines.append(f"looked in        {looked}: {self.files:,} files{cut}")
        if self.images is None:
            if any(lost.at is not None for lost in self.lost):
                lines.append(
                    f"  → change the paths in {_clean(self.source)}; --json has all of them"
                )
            if any(lost.at is None for lost in self.lost):
                lines.append("  → take out of it what was not found, or put those files there")
        return "\n".join([*lines, f"  → {self.command}"])


def diagnose(error: MissingError, source: str, places: Iterable[Path]) -> Diagnosis:
    """Find the missing files of a listing.

    Args:
        error: what `data.open` raised.
        source: the dataset, as it was given.
        places: folders to look in; those that are not there are passed over.
    """
    lost = {path: Lost(path, "nowhere") for path in error.missing}
    seen: set[tuple[int, int]] = set()
    count, looked_in = 0, []
    for place in dict.fromkeys(places):
        left = [path for path, one in lost.items() if one.kind == "nowhere"]
        if not left or count >= MOST:
            break
        # what lies nearer is taken before what may be of another dataset
        tree, files_seen = _named(place, left, seen, MOST - count)
        lost |= {path: _find(path, tree) for path in left}
        count += files_seen
        looked_in.append(str(place))
    images = _common_root(error, list(lost.values()))
    return Diagnosis(source, error, list(lost.values()), looked_in, count, images)


def _named(
    place: Path, paths: Sequence[str], seen: set[tuple[int, int]], most: int
) -> tuple[dict[str, list[str]], int]:
    """Collect the files below a folder that have a wanted name, by its key; count all files."""
    wanted = {_key(_parts(form)[-1]) for path in paths for form in _forms(path)}
    tree: defaultdict[str, list[str]] = defaultdict(list)
    count = 0
    for folder, names in _walk(place, seen):
        for name in names[: most - count]:
            if (key := _key(name)) in wanted:
                tree[key].append(os.path.join(folder, name))
        count += len(names)
        if count >= most:
            return tree, most
    return tree, count


def _walk(place: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[str, list[str]]]:
    """Yield folders and names of their files, links followed, no folder entered twice."""
    for folder, subfolders, names in os.walk(place, followlinks=True):
        try:
            status = os.stat(folder)
        except OSError:
            subfolders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield os.path.abspath(folder), names


def _parts(path: str) -> list[str]:
    r"""Split a path of any system into names: C:\photos\a.jpg has photos and a.jpg."""
    plain = re.sub(r"^[A-Za-z]:", "", path).replace("\\", "/")
    return [part for part in plain.split("/") if part not in ("", ".", "..")]


def _find(path: str, tree: dict[str, list[str]]) -> Lost:
    forms = ((_parts(form), kind) for form, kind in _forms(path).items())
    parts, kind = next((one for one in forms if _key(one[0][-1]) in tree), ([], "nowhere"))
    if not parts:
        return Lost(path, kind)
    candidates = tree[_key(parts[-1])]
    rated = sorted((_agreement(parts, _parts(at)), at) for at in candidates)
    best, at = rated[-1]
    if len(rated) > 1 and rated[-2][0] == best:
        return Lost(path, "ambiguous")
    if "\\" in path:
        return Lost(path, "backslash", at)
    if path.startswith("/"):
        return Lost(path, "absolute", at)
    if kind != "folder":
        return Lost(path, kind, at)
    name, listed = os.path.basename(at), parts[-1]
    if name == listed:
        return Lost(path, "folder", at)
    return Lost(path, "case" if name.casefold() == listed.casefold() else "unicode", at)


def _forms(path: str) -> dict[str, str]:
    """Return the ways to read a listed path, the plain one first, and the kind of each."""
    if not _parts(path):
        return {}
    forms = {path: "folder"}
    plain = re.sub(r"#\d+$", "", path)
    forms.setdefault(plain, "number")
    forms.setdefault(unquote(plain), "escapes")
    stem, end = os.path.splitext(unquote(plain))
    if end.lower() in _JPEG:
        for other in _JPEG:
            forms.setdefault(stem + other, "ending")
    return {form: kind for form, kind in forms.items() if _parts(form)}


def _key(name: str) -> str:
    """Return a name, capitals and Unicode forms aside."""
    return formats.name_key(name.casefold())


def _agreement(wanted: list[str], path: list[str]) -> tuple[int, int]:
    """Count the names that agree from the end, by their keys, and those that do to the letter."""
    alike = exact = 0
    for one, other in zip(reversed(wanted), reversed(path), strict=False):
        if _key(one) != _key(other):
            break
        alike, exact = alike + 1, exact + (one == other)
    return alike, exact


def _common_root(error: MissingError, lost: Sequence[Lost]) -> str | None:
    """Return a folder below which every listed file is, at the very path that is listed."""
    votes: Counter[str] = Counter()
    for one in lost:
        if one.at is not None and one.at.endswith(f"/{one.path}"):
            votes[one.at[: -len(one.path) - 1] or "/"] += 1
    for root, _ in votes.most_common(1):
        if all(os.path.isfile(os.path.join(root, entry.path)) for entry in error.listed):
            return root
    return None


def _clean(path: str | Path) -> str:
    return printable(str(path))


def _quoted(path: str) -> str:
    return shlex.quote(printable(path))
