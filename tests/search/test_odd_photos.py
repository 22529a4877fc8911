"""An index of a folder with odd names and odd kinds of files: each is found or reported."""

import json
import os
import re
import unicodedata

from crosstill import formats
from verbs import crosstill

RAW = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_odd_photos_are_indexed_or_reported(bundle_folder, photos, tmp_path):
    root = tmp_path / "odd"
    (root / "deep").mkdir(parents=True)
    (root / "deep/back").symlink_to("..")
    names = ["line\nbreak.png", os.fsdecode(b"bytes\xff.png"), "n" * 251 + ".png", "\u202egnp.png"]
    for number, name in enumerate(names):
        (root / name).write_bytes((photos / f"00000{number}.png").read_bytes())
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "IMG.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "red\x1b[31m.png").write_bytes(b"GIF89a")
    done = crosstill("index", bundle_folder, root, "--out", tmp_path / "index")
    assert "4 photos" in done.stdout
    rows = map(json.loads, (tmp_path / "index/quarantine.jsonl").read_text().splitlines())
    assert {row["path"]: row["class"] for row in rows} == {
        "deep/back": "unreadable",
        "pipe.png": "unreadable",
        "loop.png": "unreadable",
        "IMG.HEIC": "unsupported-format",
        "renamed.jpg": "unsupported-format",
        "red\x1b[31m.png": "truncated",
    }
    found = crosstill("search", tmp_path / "index", "a red circle")
    verified = crosstill("index", "verify", tmp_path / "index")
    for said in (done, found, verified):
        assert not RAW.search(said.stdout + said.stderr)
    assert r"line\nbreak.png" in found.stdout


def test_formats_that_are_not_read_are_listed_with_their_size(bundle_folder, photos, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    content = (photos / "000000.png").read_bytes()
    for name in ("a.png", ".hidden.cr2", "._a.png"):
        (root / name).write_bytes(content)
    (root / "two.MPO").write_bytes((photos / "000001.png").read_bytes())
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX/b.png").write_bytes(content)
    bad = [f"x{ending}" for ending in formats.UNSUPPORTED]
    bad += [name.upper() for name in bad]
    for number, name in enumerate(bad):
        (root / name).write_bytes(content[: 50 + number])
    done = crosstill("index", bundle_folder, root, "--out", tmp_path / "index")
    assert "2 photos" in done.stdout
    rows = [*map(json.loads, (tmp_path / "index/quarantine.jsonl").read_text().splitlines())]
    sizes = {row["path"]: row["bytes"] for row in rows}
    assert sizes == {name: 50 + number for number, name in enumerate(bad)}
    assert {row["class"] for row in rows} == {"unsupported-format"}


def test_captions_are_found_as_datasets_find_them(bundle_folder, photos, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (root / f"{nfd}.PNG").write_bytes((photos / "000000.png").read_bytes())
    (root / f"{nfc}.TXT").write_text("\ufeffthe first")
    crosstill("index", bundle_folder, root, "--out", tmp_path / "index")
    found = json.loads(crosstill("search", tmp_path / "index", "a circle", "--json").stdout)
    assert "'the first'" in str(found)
