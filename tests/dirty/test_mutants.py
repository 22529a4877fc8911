"""Damaged files of every format: no crash, no hang, each one in the report."""

import csv
import json
import random
import time
from pathlib import Path

import pytest
from mutants import mutated, seeds

from crosstill import cache, data, images
from crosstill.errors import ImageError
from crosstill.pixels import CLASSES

READ = {"JPEG", "PNG", "APNG", "GIF", "WebP", "BMP", "TIFF", "PPM", "PGM"}  # by first words


def listing(folder: Path, count: int) -> Path:
    draw, files = random.Random(7), seeds()
    rows = []
    for number in range(count):
        kind = list(files)[number % len(files)]
        name = f"{kind.replace(' ', '-')}-{number}"
        (folder / name).write_bytes(mutated(files[kind], draw))
        rows.append((name, "a caption"))
    with (folder / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "caption"), *rows])
    return folder / "all.csv"


def verdict(content: bytes, path: str) -> str:
    began = time.process_time()
    try:
        pixels = images.load(content, path, images.Preprocess((16, 16), "crop"))
    except ImageError as error:
        assert str(error).isprintable() and " at 0x" not in str(error)
        return error.reason
    finally:
        assert time.process_time() - began < 5, path  # a worker has a limit of its own
    assert pixels.shape == (3, 16, 16)
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_damaged_file_is_in_the_report(tmp_path, count):
    pairs = data.open(listing(tmp_path, count))
    first = {e.path: verdict(pairs.read(e), e.path) for e in pairs.examples}
    second = {e.path: verdict(pairs.read(e), e.path) for e in pairs.examples}
    assert first == second
    bad = {path: reason for path, reason in first.items() if reason}
    assert len(first) > 0.95 * count  # a few came out alike, and are one image
    assert 0.3 * count < len(bad) < 0.9 * count
    made = cache.build(None, pairs, tmp_path / "cache")
    lines = (tmp_path / "cache/quarantine.jsonl").read_text().splitlines()
    rows = {row["path"]: row for row in map(json.loads, lines)}
    left_out = set(first) - set(made.paths)
    assert left_out == set(rows) and made.header["quarantined"] == len(rows)
    for path, row in rows.items():
        # a student's crop refuses more than decoding alone: what is too long for it
        assert row["reason"] == bad[path]
        assert row["class"] in CLASSES
        assert row["bytes"] == (tmp_path / path).stat().st_size
    assert all(bad[path].startswith("too many pixels") for path in set(bad) - left_out)
    read = {path.split("-")[0] for path in made.paths}
    assert read <= READ and len(read) >= 7


def test_unharmed_files_are_read_and_other_formats_are_named():
    for kind, content in seeds().items():
        wanted = "" if kind.split()[0] in READ else "not an image"
        wanted = f"{kind} is not read; convert it to JPEG or PNG" if kind in NAMED else wanted
        assert verdict(content, kind) == wanted


NAMED = {"AVIF", "JPEG 2000"}
