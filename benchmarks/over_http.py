"""Recall of captions through `crosstill serve`, beside what `crosstill evaluate` says.

The photos of a split are indexed (flat), the command that ships is started, every caption is
asked for over HTTP, and the place of its photo among ten counts. Equal up to ties and rounding.

    python -m benchmarks.over_http BUNDLE DATA [--images DIR] [--split val]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import local
from urllib.parse import urlencode

from crosstill import data, evaluate
from crosstill.data import Pairs
from crosstill.evaluate.recall import DEPTHS
from crosstill.search import index_builder
from crosstill.teachers.exported import BundleModel

CLIENTS = 4


def main(bundle: Path, source: str, images: Path | None, split: str) -> None:
    """Print R@1, R@5 and R@10 of text to image, both ways."""
    pairs = data.open(source, images=images).split(split)
    direct = evaluate.retrieval(BundleModel(bundle, bundle.name), pairs, "karpathy").recall.t2i.fair
    with tempfile.TemporaryDirectory() as beside:
        photos = Path(beside) / "photos"
        photos.mkdir()
        for number, example in enumerate(pairs.examples):
            suffix = Path(example.path).suffix
            (photos / f"{number}{suffix}").write_bytes(pairs.read(example))
        index_builder.build(bundle, photos, Path(beside) / "index")
        with _serving(Path(beside) / "index") as port:
            served = _recall(port, pairs)
    for depth, one, other in zip(DEPTHS, direct, served, strict=True):
        print(f"text→image R@{depth}: evaluate {one:.2f}, over HTTP {other:.2f}")
    print(f"greatest difference {max(abs(a - b) for a, b in zip(direct, served, strict=True)):.2f}")


def _recall(port: int, pairs: Pairs) -> list[float]:
    asked = [(text, example.image_id) for example in pairs.examples for text in example.captions]
    held = local()

    def place(question: tuple[str, str]) -> int:
        """Where the caption's photo is among the results, from 0; 10 where it is not."""
        if not hasattr(held, "line"):
            held.line = HTTPConnection("127.0.0.1", port)
        held.line.request("GET", "/search?" + urlencode({"q": question[0], "top": DEPTHS[-1]}))
        found = [hit["id"] for hit in json.loads(held.line.getresponse().read())["results"]]
        return found.index(question[1]) if question[1] in found else DEPTHS[-1]

    with ThreadPoolExecutor(CLIENTS) as pool:
        places: Sequence[int] = list(pool.map(place, asked))
    return [100 * sum(at < depth for at in places) / len(places) for depth in DEPTHS]


@contextmanager
def _serving(index: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "crosstill", "serve", str(index), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        at = re.search(r":(\d+)", process.stdout.readline())
        assert at is not None
        yield int(at[1])
        process.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--split", default="val")
    main(**vars(parser.parse_args()))
