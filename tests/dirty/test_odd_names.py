"""Odd names and odd kinds of files are read or reported, never waited for, never printed raw."""

import json
import os
import re
from pathlib import Path

import pytest
from oddities import FINE, lay
from typer.testing import Result

from crosstill import data
from crosstill.data.pairs import regular
from crosstill.search.scan import walk
from verbs import crosstill

RAW = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def photos(tmp_path) -> tuple[Path, dict[str, str]]:
    """A folder dataset: every photo has a caption."""
    odd = lay(tmp_path / "photos")
    for name in odd:
        sidecar = os.path.splitext(name)[0] + ".txt"
        (tmp_path / "photos" / sidecar).write_text("a caption")
    return tmp_path / "photos", odd


def kinds(rows) -> dict[str, str]:
    return {row["path"]: row["class"] for row in rows}


def test_a_folder_of_odd_names(photos):
    root, odd = photos
    pairs = data.open(root)
    assert {example.path for example in pairs.examples} == {n for n, why in odd.items() if not why}
    assert kinds(pairs.quarantine.rows) == {name: why for name, why in odd.items() if why}
    assert all(pairs.read(example) for example in pairs.examples)


def listing(root: Path, names) -> Path:
    rows = [{"filename": name, "sentences": [{"raw": "a caption"}]} for name in names]
    path = root / "all.json"
    path.write_text(json.dumps({"images": rows}))  # any name at all, by its escapes
    return path


def test_a_listing_of_odd_names(photos):
    root, odd = photos
    del odd["dead.png"]  # listed and missing is a mistake in the listing
    pairs = data.open(listing(root, odd))
    assert [example.path for example in pairs.examples] == list(FINE.values())
    assert kinds(pairs.quarantine.rows) == {name: why for name, why in odd.items() if why}


def test_odd_names_go_through_a_cache(photos, tmp_path):
    root, odd = photos
    done = crosstill("cache", "none", root, "--out", tmp_path / "cache")
    lines = (tmp_path / "cache/quarantine.jsonl").read_text().splitlines()
    assert kinds(map(json.loads, lines)) == {name: why for name, why in odd.items() if why}
    assert f"{len(FINE)} images" in clean(done)
    again = crosstill("cache", "verify", tmp_path / "cache")
    assert f"{len(FINE)} images" in clean(again)


def test_the_doctor_names_them_without_obeying_them(photos):
    root, odd = photos
    (root / FINE["an escape"]).write_bytes(b"no image")
    text = clean(crosstill("doctor", root))
    assert r"red\x1b[31m.png: not an image" in text
    found = json.loads(clean(crosstill("doctor", root, "--json")))
    bad = {name for name, why in odd.items() if why} | {FINE["an escape"]}
    assert set(kinds(found["data"]["unreadable"])) == bad


def test_an_error_with_an_odd_name_is_one_line(tmp_path):
    lay(tmp_path)
    done = crosstill("doctor", listing(tmp_path, ["gone\n\x1b[2J\udcff.png"]), code=2)
    assert r"gone\n\x1b[2J\xff.png" in clean(done)
    done = crosstill("cache", "none", tmp_path / "all.json", "--out", tmp_path / "c", code=2)
    assert len(done.stderr.splitlines()) == 1
    assert r"gone\n\x1b[2J\xff.png" in clean(done)


def clean(done: Result) -> str:
    """All that was printed, which a terminal takes for plain text."""
    text = done.stdout + done.stderr
    assert not RAW.search(text), text
    return text


def test_an_index_says_the_same(photos):
    root, odd = photos
    scan = walk(root)
    assert set(scan.photos) == {name for name, why in odd.items() if not why} | {"empty.png"}
    said = set(scan.problems)
    assert said == {name for name, why in odd.items() if why and name != "empty.png"} | {
        "deep/back"
    }


def test_an_unreadable_folder_is_reported(photos, monkeypatch):
    root, odd = photos
    (root / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    rows = kinds(data.open(root).quarantine.rows)
    assert rows == {n: why for n, why in odd.items() if why} | {"closed": "unreadable"}


def test_a_photo_that_vanishes_while_the_folder_is_read(photos, monkeypatch):
    root, odd = photos

    def vanish(path):
        (root / FINE["a new line"]).unlink(missing_ok=True)
        return regular(path)

    monkeypatch.setattr("crosstill.data.collection.regular", vanish)
    pairs = data.open(root)
    gone = {FINE["a new line"]: "missing"}
    assert kinds(pairs.quarantine.rows) == {n: why for n, why in odd.items() if why} | gone


def test_a_folder_that_vanishes_while_it_is_walked(photos, monkeypatch):
    root, _ = photos
    (root / "short-lived").mkdir()
    stat = os.stat

    def vanish(path, *args, **options):
        if os.fspath(path).endswith("short-lived"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", vanish)
    assert len(data.open(root)) == len(FINE)


def test_a_caption_file_that_vanishes_is_no_caption(photos, monkeypatch):
    root, _ = photos
    name = FINE["255 bytes"]
    read = Path.read_bytes

    def vanish(path):
        if path.name == os.path.splitext(name)[0] + ".txt":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    pairs = data.open(root)
    assert [e.path for e in pairs.examples if not e.captions] == [name]
