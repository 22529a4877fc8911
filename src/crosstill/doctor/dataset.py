"""Examine a dataset that opens: leaks, captions, unreadable images."""

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from crosstill import data, decoding, images, progress
from crosstill.data import Pairs
from crosstill.data.pairs import Copy
from crosstill.doctor.missing import Diagnosis, diagnose
from crosstill.errors import DataError, MissingError, printable
from crosstill.teachers.base import count_truncated
from crosstill.types import Example

LONG = 28  # words: with a start and an end token these fill the default 30 of a student
LONG_CAPTION = 1_000  # characters: no model reads that far
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
    "photos without captions": "",
    "empty captions": "nothing, if they mean nothing; they are not used",
    "captions with broken Unicode": "save the listing as UTF-8 again, from its source",
    "images without a split": "nothing: the same images always get the same split",
    "text files without an image": "name each text file like its image",
    "listings beside the photos": "if it has the captions, give it as DATA, and the folder after "
    "--images",
    "captions rebuilt from tokens": "nothing; Karpathy's JSON has the originals",
    "captions without an image beside": (
        "name texts like their image and put them beside it: tar --sort=name"
    ),
    "members that are neither": "nothing",
    "lists of captions written": "nothing, if they are lists; write a caption a row otherwise",
    "rows of a table that run": "nothing, if captions have lines; else double that quote",
    "compressed row groups": "write the image column without compression",
}


class Report:
    """What is found in a dataset: as JSON, as text, and the error to end with, if any."""

    def __init__(self) -> None:
        self.data: dict[str, Any] | None = None
        self.findings: list[Finding] = []
        self.paths: Diagnosis | None = None

    @property
    def error(self) -> DataError | None:
        """The reason why the dataset cannot be opened, if it cannot."""
        return self.paths.refusal if self.paths else None

    def to_json(self) -> dict[str, Any]:
        """Return `data`, or `paths` where the dataset does not open."""
        record: dict[str, Any] = {}
        if self.data is not None:
            record["data"] = self.data | {"findings": [each.to_json() for each in self.findings]}
        if self.paths is not None:
            record["paths"] = self.paths.to_json()
        return record

    def text(self) -> str:
        """Describe the same for people, on a screen or two."""
        if self.paths is not None:
            return self.paths.text()
        assert self.data is not None
        lines = [*_summary(self.data), ""]
        return "\n".join(lines + [line for finding in self.findings for line in finding.lines()])


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
        """Return all of it."""
        plain = {"finding": self.name, "count": self.count, "says": self.says, "fix": self.fix}
        return plain | {"rows": list(self.rows)}

    def lines(self) -> list[str]:
        """Describe it in lines of text, with `SHOWN` of its rows."""
        shown = [f"  {self.line(row)}" for row in islice(self.rows, SHOWN)]
        more = len(self.rows) - len(shown)
        rest = [f"  and {more:,} more, all of them with --json"] if more else []
        fix = [f"  → {self.fix}"] if self.fix else []
        return [f"{self.name:16} {self.count:,}: {self.says}", *shown, *rest, *fix]


def examine(
    source: str,
    folder: Path | None = None,
    model: str | None = None,
    splits: Path | None = None,
) -> Report:
    """Dry-run a dataset: every image is decoded.

    Args:
        source: as `data.open` takes it.
        folder: where its images are, if not beside it.
        model: whose tokenizer decides what is cut; None counts words instead.
        splits: a file in Karpathy's layout that says the split of each image.

    Raises:
        DataError: no dataset; one whose files are missing is diagnosed instead.
    """
    report = Report()
    try:
        pairs = _open(source, folder, splits)
    except MissingError as error:
        report.paths = diagnose(error, source, _places(source, folder))
        return report
    bad = [*pairs.quarantine.rows, *_undecodable(pairs)]
    report.data = _described(pairs, bad, model)
    words = [source, *(["--images", str(folder)] if folder is not None else [])]
    words += ["--splits", str(splits)] if splits is not None else []
    report.findings = find(pairs, bad, printable(shlex.join(words)))
    return report


def _open(source: str, folder: Path | None, splits: Path | None) -> Pairs:
    if folder is None or folder.is_dir():
        return data.open(source, images=folder, splits=splits)
    wrong = DataError(f"{folder}: no such folder of images; check --images")
    if not Path(source).is_file():
        raise wrong
    # what the listing names is known all the same, and can be looked for
    try:
        data.open(source, splits=splits)
    except MissingError as error:
        raise MissingError(str(wrong), folder, error.listed, error.missing) from None
    raise DataError(f"{wrong}: every file is beside {source}, so leave it out")


def _places(source: str, folder: Path | None) -> list[Path]:
    """Return folders to look for missing files in, the nearest first; home and root never whole."""
    beside = Path(source).absolute().parent
    given = folder.absolute() if folder is not None else beside
    while not given.is_dir():
        given = given.parent
    never = {Path.home(), Path(given.anchor)}
    near = [place for place in (given, beside) if place not in never]
    return near + [place.parent for place in near if place.parent not in never]


def _summary(dataset: dict[str, Any]) -> list[str]:
    per, cut = dataset["captions_per_image"], dataset["truncated"]
    return [
        f"{'dataset':16} {dataset['name']}",
        f"{'images':16} {_counts(dataset['splits'])}",
        *([f"{'captioned':16} {dataset['captioned']:,} of them"] if dataset["bare"] else []),
        *([f"{'usable':16} {dataset['usable']:,} of them"] if dataset["unreadable"] else []),
        f"{'captions':16} {dataset['captions']:,}, an image has {per['least']} to {per['most']}",
        f"{'truncated':16} {cut['count']:,} captions ({cut['rule']})",
        f"{'unreadable':16} {len(dataset['unreadable']):,} images",
    ]


def _counts(splits: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {count:,}" for name, count in splits.items())
    return f"{sum(splits.values()):,} ({parts})"


def _described(pairs: Pairs, bad: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    captions = [caption for example in pairs.examples for caption in example.captions]
    counts = [len(example.captions) for example in pairs.examples] or [0]
    listed = {example.path for example in pairs.examples}
    return {
        "name": pairs.name,
        "splits": pairs.splits,
        "usable": len(pairs) - sum(row["path"] in listed for row in bad),
        "captioned": sum(count > 0 for count in counts),
        "bare": counts.count(0) if pairs.examples else 0,
        "captions": len(captions),
        "captions_per_image": {
            "least": min(counts),
            "most": max(counts),
            "histogram": dict(sorted(Counter(counts).items())),
        },
        "truncated": _truncated(captions, model),
        "unreadable": bad,
        "classes": dict(Counter(row["class"] for row in bad).most_common()),
        "notes": list(pairs.notes),
    }


def _truncated(captions: list[str], model: str | None) -> dict[str, Any]:
    if model is None:
        count = sum(len(re.findall(r"\w+|[^\w\s]", caption)) > LONG for caption in captions)
        return {"count": count, "rule": f"more than {LONG} words; --model counts exactly"}
    from crosstill.models import open as open_model  # which loads transformers

    opened = open_model(model, "encoder")
    return {"count": count_truncated(opened, captions), "rule": f"cut by {opened.name}"}


def _undecodable(pairs: Pairs) -> list[dict[str, Any]]:
    quarantine = images.Quarantine()

    def check(example: Example) -> images.Unreadable | None:
        def decode(file: bytes) -> None:
            images.decode(file, example.path)  # pixels of all images would fill the memory

        return images.try_load(pairs.read, example, decode)

    with progress.bar("images", len(pairs.examples)) as bar:
        for problem in decoding.ahead(check, pairs.examples, window=64):
            bar.advance()
            if problem is not None:
                quarantine.add(*problem)
    return list(quarantine.rows)


def find(pairs: Pairs, unreadable: Sequence[dict[str, Any]], source: str = "DATA") -> list[Finding]:
    """Find leaks, captions and unreadable images to look at, the most harmful first.

    Args:
        pairs: the dataset, opened.
        unreadable: rows as in quarantine.jsonl.
        source: the dataset as it is given to commands.
    """
    findings = [
        *_copies(pairs.copies),
        *_classes(unreadable),
        *_bare(pairs, source),
        *_shared(pairs),
        *_repeated(pairs),
        *_unusual(pairs),
        *map(_note, pairs.notes),
    ]
    return [finding for finding in findings if finding.count]


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
    """Yield a finding for each class of failure, the most frequent first."""
    for kind, count in Counter(row["class"] for row in unreadable).most_common():
        rows = [row for row in unreadable if row["class"] == kind]
        yield Finding("unreadable", count, kind, FIXES[kind], rows, _unreadable)


def _unreadable(row: dict[str, Any]) -> str:
    return f"{printable(row['path'])}: {printable(row['reason'])} ({row['bytes']:,} bytes)"


def _bare(pairs: Pairs, source: str) -> Iterable[Finding]:
    """Yield the photos without captions, and the commands that learn from them all the same."""
    yield Finding(
        "bare photos",
        sum(not example.captions for example in pairs.examples),
        "photos without captions: a student learns from what a teacher makes of them, beside "
        "sentences of any origin (LINES.txt, one a line)",
        f"crosstill cache openai/clip-vit-base-patch32 {source} --texts LINES.txt --out caches/mine"
        "; crosstill train caches/mine --out runs/mine",
    )


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
    captions = [(e.path, caption) for e in pairs.examples for caption in e.captions]
    long = [_caption_row(*pair) for pair in captions if len(pair[1]) > LONG_CAPTION]
    yield Finding(
        "long captions",
        len(long),
        f"captions of more than {LONG_CAPTION:,} characters",
        "a model reads their beginning only; make several captions of each",
        long,
        _caption,
    )
    control = [_caption_row(*pair) for pair in captions if _CONTROL.search(pair[1])]
    yield Finding(
        "control codes",
        len(control),
        "captions with control characters, used as they are, never printed so",
        "take them out of the listing, unless they are meant",
        control,
        _caption,
    )


def _caption_row(path: str, caption: str) -> dict[str, Any]:
    return {"path": path, "caption": caption, "characters": len(caption)}


def _caption(row: dict[str, Any]) -> str:
    return f"{printable(row['path'])}: {_short(row['caption'])}, {row['characters']:,} characters"


def _short(caption: str) -> str:
    return f"“{printable(caption[:_CUT])}{'…' if len(caption) > _CUT else ''}”"


def _note(note: str) -> Finding:
    """Make a finding of a note of `data.open`: a text, a colon and a number."""
    text, _, number = note.rpartition(": ")
    count = int(number) if text and number.isdigit() else 1
    start = next((start for start in _NOTES if note.startswith(start)), None)
    if start in ("copies of an image", "photos without captions"):
        count = 0
    says = text if text and number.isdigit() else note
    return Finding("note", count, says, _NOTES.get(start or "", ""))
