"""What the doctor finds in a dataset that opens: leaks, captions, unreadable images, with a fix."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from crosstill.data import Pairs
from crosstill.data.pairs import Copy
from crosstill.errors import printable

LONG = 1_000  # characters: no model reads that far
SHOWN = 2  # rows of a finding that the text shows; JSON has all
_CUT = 60  # characters of a caption that the text shows

# new lines and tabs aside; the last two ranges turn the direction of writing
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# what to do about each of `pixels.CLASSES`
FIXES = {
    "empty": "a download that never began: fetch these files again",
    "not-an-image": "often a web page saved in place of a photo: fetch it again, or leave it out",
    "too-large": "make it smaller with any image program, if it is what it claims to be",
    "too-slow": "save it anew as JPEG or PNG from a program that opens it",
    "truncated": "a download or copy that broke off: fetch these files again",
    "damaged": "fetch it again, or save it anew from a program that still opens it; "
    "a text as UTF-8",
    "missing": "it went away while the folder was read: run this again",
    "changed": "it was written to while the folder was read: run this again",
    "no-caption": "give it a caption, or leave it out of the dataset",
    "no-vector": "compute the vectors of these images too",
    "unsupported-format": "convert it to JPEG or PNG",
    "unreadable": "check the permissions, and that it is an ordinary file",
}

# what to do about notes of `data.open`, by their beginning
_NOTES = {
    "copies of an image": "",  # findings of their own say more
    "empty captions": "nothing, if they mean nothing; they are not used",
    "captions with broken Unicode": "save the listing as UTF-8 again, from its source",
    "images without a split": "nothing: the same images always get the same split",
    "text files without an image": "name each text file like its image",
    "captions rebuilt from tokens": "nothing; Karpathy's JSON has the originals",
    "captions without an image beside": (
        "name texts like their image and put them beside it: tar --sort=name"
    ),
    "members that are neither": "nothing",
    "lists of captions written": "nothing, if they are lists; write a caption a row otherwise",
    "rows of a table that run": "nothing, if captions have lines; else double that quote",
    "compressed row groups": "write the image column without compression",
}


@dataclass(frozen=True)
class Finding:
    """Something that a person should know, and what to do about it.

    Attributes:
        name: short and stable, for programs.
        count: how many there are.
        says: what they are.
        fix: what to do.
        rows: each of them, as JSON.
        line: a row as text.
    """

    name: str
    count: int
    says: str
    fix: str
    rows: Sequence[dict[str, Any]] = ()
    line: Callable[[dict[str, Any]], str] = str

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        plain = {"finding": self.name, "count": self.count, "says": self.says, "fix": self.fix}
        return plain | {"rows": list(self.rows)}

    def lines(self) -> list[str]:
        """It as text, `SHOWN` rows of it, on lines of their own."""
        shown = [f"  {self.line(row)}" for row in islice(self.rows, SHOWN)]
        more = len(self.rows) - len(shown)
        rest = [f"  and {more:,} more, all of them with --json"] if more else []
        fix = [f"  → {self.fix}"] if self.fix else []
        return [f"{self.name:16} {self.count:,}: {self.says}", *shown, *rest, *fix]


def search(pairs: Pairs, unreadable: Sequence[dict[str, Any]]) -> list[Finding]:
    """Everything found, what does most harm first.

    Args:
        pairs: the dataset, opened.
        unreadable: rows as in quarantine.jsonl.
    """
    found = [
        *_copies(pairs.copies),
        *_classes(unreadable),
        *_shared(pairs),
        *_repeated(pairs),
        *_unusual(pairs),
        *map(_note, pairs.notes),
    ]
    return [finding for finding in found if finding.count]


def _copies(copies: Sequence[Copy]) -> Iterable[Finding]:
    leaks = [copy._asdict() for copy in copies if copy.split != copy.first_split]
    rest = [copy._asdict() for copy in copies if copy.split == copy.first_split]
    yield Finding(
        "leak",
        len(leaks),
        "copies of an image of another split, left out here with their captions",
        "take them out of the listing, for others who read it; the first one listed stays",
        leaks,
        _copy,
    )
    yield Finding(
        "copies",
        len(rest),
        "copies of an image of the same split, captions merged into the first",
        "nothing: each image counts once",
        rest,
        _copy,
    )


def _copy(row: dict[str, Any]) -> str:
    first = f"{row['first_split']} {printable(row['first'])}"
    return f"{row['split']} {printable(row['path'])} = {first}"


def _classes(unreadable: Sequence[dict[str, Any]]) -> Iterable[Finding]:
    """One finding for each class of failure, the most frequent first."""
    for kind, count in Counter(row["class"] for row in unreadable).most_common():
        rows = [row for row in unreadable if row["class"] == kind]
        yield Finding("unreadable", count, kind, FIXES[kind], rows, _unreadable)


def _unreadable(row: dict[str, Any]) -> str:
    return f"{printable(row['path'])}: {printable(row['reason'])} ({row['bytes']:,} bytes)"


def _shared(pairs: Pairs) -> Iterable[Finding]:
    places: defaultdict[str, dict[str, str]] = defaultdict(dict)  # caption → path → split
    for example in pairs.examples:
        for caption in example.captions:
            places[caption][example.path] = example.split
    several = ((text, images) for text, images in places.items() if len(images) > 1)
    rows = [
        {"caption": text, "images": list(images), "splits": sorted(set(images.values()))}
        for text, images in sorted(several, key=lambda item: -len(item[1]))
    ]
    images = len({path for row in rows for path in row["images"]})
    yield Finding(
        "shared captions",
        len(rows),
        f"captions that stand at several images, {images:,} images in all",
        "evaluation takes each of their images for right; more telling captions measure more",
        rows,
        lambda row: (
            f"{_short(row['caption'])}: {len(row['images'])} images "
            f"of {', '.join(row['splits'])}, {printable(row['images'][0])} first"
        ),
    )


def _repeated(pairs: Pairs) -> Iterable[Finding]:
    rows = [
        {"path": example.path, "caption": caption, "times": times}
        for example in pairs.examples
        for caption, times in Counter(example.captions).items()
        if times > 1
    ]
    yield Finding(
        "equal captions",
        len(rows),
        "captions that stand twice or more at one image",
        "they count as often as they stand there; keep one of each if that is not meant",
        rows,
        lambda row: f"{printable(row['path'])}: {row['times']} times {_short(row['caption'])}",
    )


def _unusual(pairs: Pairs) -> Iterable[Finding]:
    told = [(e.path, caption) for e in pairs.examples for caption in e.captions]
    long = [_described(*pair) for pair in told if len(pair[1]) > LONG]
    yield Finding(
        "long captions",
        len(long),
        f"captions of more than {LONG:,} characters",
        "a model reads their beginning only; make several captions of each",
        long,
        _caption,
    )
    control = [_described(*pair) for pair in told if _CONTROL.search(pair[1])]
    yield Finding(
        "control codes",
        len(control),
        "captions with control characters, used as they are, never printed so",
        "take them out of the listing, unless they are meant",
        control,
        _caption,
    )


def _described(path: str, caption: str) -> dict[str, Any]:
    return {"path": path, "caption": caption, "characters": len(caption)}


def _caption(row: dict[str, Any]) -> str:
    return f"{printable(row['path'])}: {_short(row['caption'])}, {row['characters']:,} characters"


def _short(caption: str) -> str:
    return f"“{printable(caption[:_CUT])}{'…' if len(caption) > _CUT else ''}”"


def _note(note: str) -> Finding:
    """What `data.open` says: some text, a colon and a number."""
    text, _, number = note.rpartition(": ")
    count = int(number) if text and number.isdigit() else 1
    start = next((start for start in _NOTES if note.startswith(start)), None)
    if start == "copies of an image":
        count = 0
    says = text if text and number.isdigit() else note
    return Finding("note", count, says, _NOTES.get(start or "", ""))
