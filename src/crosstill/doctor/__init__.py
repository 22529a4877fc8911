"""Is this machine ready, is this dataset sound? A dry run that changes nothing.

findings    leaks, captions, classes of unreadable images: what is found in a dataset
paths       where listed files are that are not where the listing says
"""

from __future__ import annotations

import importlib.util
import platform
import re
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from crosstill import data, decoding, images, progress
from crosstill.data import Pairs
from crosstill.doctor import findings, paths
from crosstill.doctor.paths import Diagnosis
from crosstill.errors import ConfigError, DataError, ImageError, MissingError
from crosstill.evaluate import open_encoder
from crosstill.types import Example

# what the extras bring, by the name that Python imports
_OPTIONAL = (
    "datasets",
    "faiss",
    "fastapi",
    "matplotlib",
    "onnxruntime",
    "open_clip",
    "pymilvus",
    "sentence_transformers",
    "sentencepiece",
    "tensorboard",
)
LONG = 28  # words: with a start and an end token these fill the default 30 of a student


class Report:
    """What `crosstill doctor` found: as JSON, as text, and the error to end with, if any."""

    def __init__(self) -> None:
        self.environment = _environment()
        self.data: dict[str, Any] | None = None
        self.findings: list[findings.Finding] = []
        self.paths: Diagnosis | None = None
        self.mended: str | None = None

    @property
    def error(self) -> DataError | None:
        """Why the dataset cannot be opened; None once it was mended."""
        return self.paths.refusal if self.paths and not self.mended else None

    def to_json(self) -> dict[str, Any]:
        """`environment`, and `data` or `paths` where a dataset was given."""
        found: dict[str, Any] = {"environment": self.environment}
        if self.data is not None:
            found["data"] = self.data | {"findings": [each.to_json() for each in self.findings]}
        if self.paths is not None:
            found["paths"] = self.paths.to_json()
        return found

    def text(self) -> str:
        """The same for people, on a screen or two."""
        lines = [f"{name:16} {value}" for name, value in self.environment.items()]
        if self.data is not None:
            lines += ["", *_summary(self.data), ""]
            lines += [line for finding in self.findings for line in finding.lines()]
        if self.paths is not None:
            lines += ["", self.paths.text()]
        return "\n".join([*lines, *([self.mended] if self.mended else [])])


def examine(
    source: str | None = None,
    folder: Path | None = None,
    model: str | None = None,
    mend: Path | None = None,
    splits: Path | None = None,
) -> Report:
    """Look at the machine, and dry-run a dataset.

    Args:
        source: a dataset as `data.open` takes it; None looks at the machine only.
        folder: where its images are, if not beside it.
        model: whose tokenizer decides what is cut; None counts words instead.
        mend: where to write a listing whose paths are right, if those of `source` are not.
        splits: a file in Karpathy's layout that says the split of each image.

    Raises:
        DataError: no dataset; one whose files are missing is diagnosed instead.
        ConfigError: `mend` is there already, or no file is missing, or none was found.
    """
    report = Report()
    if source is None:
        return report
    if mend is not None:
        paths.refuse_mend(mend)
    try:
        pairs = _open(source, folder, splits)
    except MissingError as error:
        report.paths = paths.diagnose(error, source, _places(source, folder))
        if mend is not None:
            report.mended = report.paths.mend(mend)
        return report
    if mend is not None:
        raise ConfigError(f"--mend: no file that {source} lists is missing; leave it out")
    bad = [*pairs.quarantine.rows, *_undecodable(pairs)]
    report.data = _described(pairs, bad, model)
    report.findings = findings.search(pairs, bad)
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
    """Folders to look for missing files in: the nearest first, home and root never as a whole."""
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
        *([f"{'usable':16} {dataset['usable']:,} of them"] if dataset["unreadable"] else []),
        f"{'captions':16} {dataset['captions']:,}, an image has {per['least']} to {per['most']}",
        f"{'truncated':16} {cut['count']:,} captions ({cut['rule']})",
        f"{'unreadable':16} {len(dataset['unreadable']):,} images",
    ]


def _counts(splits: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {count:,}" for name, count in splits.items())
    return f"{sum(splits.values()):,} ({parts})"


def _environment() -> dict[str, str]:
    libraries = ("torch", "transformers", "numpy", "pillow", "simplejpeg")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    optional = [name for name in _OPTIONAL if importlib.util.find_spec(name)]
    return {
        "crosstill": version("crosstill"),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "device": device,
        "bf16": "yes" if cuda or torch.cpu.get_capabilities().get("amx_tile") else "too slow here",
        "extras": ", ".join(optional) or "none",
    }


def _described(pairs: Pairs, bad: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    captions = [caption for example in pairs.examples for caption in example.captions]
    counts = [len(example.captions) for example in pairs.examples] or [0]
    listed = {example.path for example in pairs.examples}
    return {
        "name": pairs.name,
        "splits": pairs.splits,
        "usable": len(pairs) - sum(row["path"] in listed for row in bad),
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
    opened = open_encoder(model)
    return {"count": opened.count_truncated(captions), "rule": f"cut by {opened.name}"}


def _undecodable(pairs: Pairs) -> list[dict[str, Any]]:
    quarantine = images.Quarantine()

    def check(example: Example) -> tuple[ImageError, int] | None:
        content = b""
        try:
            content = pairs.read(example)
            images.decode(content, example.path)
        except ImageError as error:
            return error, len(content)
        return None

    examples = pairs.examples
    with decoding.in_threads() as pool, progress.bar("images", len(examples)) as bar:
        for problem in _each(pool.map(check, examples), bar):
            if problem is not None:
                quarantine.add(*problem)
    return list(quarantine.rows)


def _each(items: Iterable[Any], bar: progress.Bar) -> Iterable[Any]:
    for item in items:
        bar.advance()
        yield item
