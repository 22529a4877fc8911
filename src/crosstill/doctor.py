"""Is this machine ready, is this dataset sound? A dry run that changes nothing."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from crosstill import data, images, progress
from crosstill.data import Pairs
from crosstill.errors import ImageError
from crosstill.evaluate import open_encoder
from crosstill.types import Example

LONG = 28  # words: with a start and an end token these fill the default 30 of a student
SHOWN = 10  # unreadable images that the text names; JSON has all


def examine(
    source: str | None = None, folder: Path | None = None, model: str | None = None
) -> dict[str, Any]:
    """Everything that `crosstill doctor` reports, as JSON.

    Args:
        source: a dataset as `data.open` takes it; None looks at the machine only.
        folder: where its images are, if not beside it.
        model: whose tokenizer decides what is cut; None counts words instead.
    """
    found: dict[str, Any] = {"environment": _environment()}
    if source is not None:
        found["data"] = _dataset(data.open(source, images=folder), model)
    return found


def text(found: dict[str, Any]) -> str:
    """The same for people to read."""
    lines = [f"{name:16} {value}" for name, value in found["environment"].items()]
    if "data" not in found:
        return "\n".join(lines)
    dataset = found["data"]
    bad = dataset["unreadable"]
    per, cut = dataset["captions_per_image"], dataset["truncated"]
    lines += [
        "",
        f"{'dataset':16} {dataset['name']}",
        f"{'images':16} {_counts(dataset['splits'])}",
        f"{'captions':16} {dataset['captions']:,}, an image has {per['least']} to {per['most']}",
        f"{'truncated':16} {cut['count']:,} captions ({cut['rule']})",
        f"{'unreadable':16} {len(bad):,} images",
        *(f"{'':16} {row['path']}: {row['reason']}" for row in bad[:SHOWN]),
        *([f"{'':16} … all of them with --json"] if len(bad) > SHOWN else []),
        *(f"{'note':16} {note}" for note in dataset["notes"]),
    ]
    return "\n".join(lines)


def _counts(splits: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {count:,}" for name, count in splits.items())
    return f"{sum(splits.values()):,} ({parts})"


def _environment() -> dict[str, str]:
    libraries = ("torch", "transformers", "numpy", "pillow", "simplejpeg")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    optional = [name for name in ("tensorboard",) if importlib.util.find_spec(name)]
    return {
        "crosstill": version("crosstill"),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "device": device,
        "bf16": "yes" if cuda or torch.cpu.get_capabilities().get("amx_tile") else "too slow here",
        "extras": ", ".join(optional) or "none",
    }


def _dataset(pairs: Pairs, model: str | None) -> dict[str, Any]:
    bad = [*pairs.quarantine.rows, *_undecodable(pairs)]
    captions = [caption for example in pairs.examples for caption in example.captions]
    counts = [len(example.captions) for example in pairs.examples] or [0]
    return {
        "name": pairs.name,
        "splits": pairs.splits,
        "captions": len(captions),
        "captions_per_image": {
            "least": min(counts),
            "most": max(counts),
            "histogram": dict(sorted(Counter(counts).items())),
        },
        "truncated": _truncated(captions, model),
        "unreadable": bad,
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
    with ThreadPoolExecutor(max_workers=4) as pool, progress.bar("images", len(examples)) as bar:
        for problem in _each(pool.map(check, examples), bar):
            if problem is not None:
                quarantine.add(*problem)
    return list(quarantine.rows)


def _each(items: Iterable[Any], bar: progress.Bar) -> Iterable[Any]:
    for item in items:
        bar.advance()
        yield item
