"""Photos a second of `crosstill index`, over the bare image tower on pixels already decoded.

Both on one thread of onnxruntime and by the clock, since reading, hashing, decoding and resizing
happen beside the encoder, on other cores. Then the same command again, with nothing new. They
take turns, each index is a new one; medians.

    python -m benchmarks.indexing [--bundle BUNDLE --photos FOLDER] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks import models
from benchmarks.timing import report
from crosstill import data, export, progress, students
from crosstill.bundle import BATCH, Bundle, Encoder
from crosstill.data.scenes import write
from crosstill.search import index_builder
from crosstill.students.student_config import StudentConfig

COUNT, SIDE = 500, 224  # JPEGs, of the size of those in docs/flickr8k.md


def main(
    bundle: Path | None = None, photos: Path | None = None, repetitions: int = 3
) -> dict[str, float]:
    """Measure, print one line and return the figures; what is not given is made."""
    progress.hide()
    with tempfile.TemporaryDirectory() as beside:
        bundle = bundle or _bundle(Path(beside) / "bundle")
        photos = photos or _photos(Path(beside) / "photos")
        result = _measure(bundle, photos, Path(beside), repetitions)
    return report("indexing", result, "at least 0.90 of the bare encoder")


def _measure(bundle: Path, photos: Path, beside: Path, repetitions: int) -> dict[str, float]:
    encoder = Encoder(Bundle.open(bundle))
    encoder.warm()
    files = sorted(path for path in photos.rglob("*") if path.suffix in (".jpg", ".png"))
    pixels = np.stack([encoder.load(path.read_bytes(), path.name) for path in files])
    times: dict[str, list[float]] = {"bare": [], "index": [], "again": []}
    for turn in range(repetitions):
        with _timed(times["bare"]):
            for start in range(0, len(pixels), BATCH):
                encoder.encode_images(pixels[start : start + BATCH])
        for name in ("index", "again"):
            with _timed(times[name]):
                built = index_builder.build(bundle, photos, beside / f"index {turn}")
        assert built.encoded == 0
    found = {name: median(seconds) for name, seconds in times.items()}
    shares = [bare / index for bare, index in zip(times["bare"], times["index"], strict=True)]
    return {**found, "ratio": median(shares)}


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start)


def _bundle(folder: Path) -> Path:
    captions = [text for e in data.open("scenes:50").examples for text in e.captions]
    student = students.build(StudentConfig.model_validate(models.STUDENT), 512, captions)
    return export.onnx(student, folder).folder


def _photos(folder: Path) -> Path:
    """Rendered scenes as JPEGs."""
    write(folder, COUNT, seed=0).unlink()
    for path in folder.glob("*.png"):
        with Image.open(path) as scene:
            large = scene.convert("RGB").resize((SIDE, SIDE))
        large.save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    main(**vars(parser.parse_args()))
