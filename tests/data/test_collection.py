"""Bad files, missing captions, duplicates and drawn splits: named, counted, never silent."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from crosstill.data.collection import Entry, Folder, Listing, collect
from crosstill.errors import DataError, ImageError
from crosstill.types import image_id


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode() * 10)
    return tmp_path


def pairs_of(root: Path, *entries: Entry, strict: bool = False):
    return collect(Listing("some", root / "list.json", Folder(root), entries), strict)


def entry(path: str, *captions: str, split: str | None = "train", listed: bool = True) -> Entry:
    return Entry(f"row {path}", path, list(captions), split, listed)


def test_missing_files_are_counted_and_the_first_is_named(root):
    wrong = [entry("a.jpg", "x"), entry("gone.jpg", "x"), entry("gone too.jpg", "x")]
    with pytest.raises(DataError, match=r"row gone\.jpg: missing image file .*gone\.jpg; 2 of 3"):
        pairs_of(root, *wrong)


def test_bad_files_are_set_apart_with_a_reason(root):
    (root / "empty.jpg").touch()
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    (root / "loop.jpg").symlink_to("loop.jpg")
    names = ["empty.jpg", "pipe.jpg", "folder.jpg", "loop.jpg", "n\0l.jpg", "l" * 300 + ".jpg"]
    pairs = pairs_of(root, entry("a.jpg", "x"), *(entry(name, "x") for name in names))
    assert [example.path for example in pairs.examples] == ["a.jpg"]
    reasons = {row["path"]: row["reason"] for row in pairs.quarantine.rows}
    assert list(reasons) == names
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["pipe.jpg"] == "cannot be read (not a regular file)"
    assert all(reason.startswith(("empty", "cannot be read (")) for reason in reasons.values())


def test_unreadable_file_is_set_apart(root, monkeypatch):
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("crosstill.data.collection.files.digest_file", refuse)
    with pytest.raises(
        DataError, match=r"none of its 1 images.*a.jpg: cannot be read \(Permission"
    ):
        pairs_of(root, entry("a.jpg", "x"))


def test_strict_stops_at_the_first_bad_file(root):
    (root / "empty.jpg").touch()
    with pytest.raises(ImageError, match="empty.jpg: empty file"):
        pairs_of(root, entry("empty.jpg", "x"), entry("a.jpg", "x"), strict=True)


def test_a_file_met_in_a_folder_may_vanish(root):
    pairs = pairs_of(root, entry("a.jpg", "x"), entry("gone.jpg", "x", listed=False))
    row = {"path": "gone.jpg", "class": "missing", "reason": "missing", "bytes": 0}
    assert pairs.quarantine.rows == [row]


def test_captions_are_stripped_and_empty_ones_counted(root):
    pairs = pairs_of(root, entry("a.jpg", "  two cats\n", "", " "), entry("b.jpg", "bad \ud800"))
    assert [example.captions for example in pairs.examples] == [("two cats",), ("bad ?",)]
    assert pairs.notes == (
        "captions with broken Unicode, each now a '?': 1",
        "empty captions left out: 2",
    )


def test_a_photo_without_captions_is_kept_and_left_out_where_pairs_are_needed(root, caplog):
    pairs = pairs_of(root, entry("a.jpg", "x"), entry("b.jpg", " "), entry("c.jpg"))
    assert [example.captions for example in pairs.examples] == [("x",), (), ()]
    assert pairs.notes == ("empty captions left out: 1", "photos without captions: 2")
    assert not pairs.quarantine.rows
    with caplog.at_level("INFO"):
        assert [example.path for example in pairs.captioned().examples] == ["a.jpg"]
    assert [record.message for record in caplog.records] == [
        f"{pairs.name}: 2 photos without captions left out"
    ]
    assert pairs.captioned().captioned() == pairs.captioned()
    bare = pairs_of(root, entry("a.jpg"), entry("b.jpg", " "))
    with pytest.raises(DataError, match="no captions in it, and they are needed here; give its"):
        bare.captioned()


def test_equal_files_become_one_image(root):
    (root / "copy.jpg").write_bytes((root / "a.jpg").read_bytes())
    pairs = pairs_of(root, entry("a.jpg", "one", "one"), entry("copy.jpg", "two", "one"))
    assert [(e.path, e.captions) for e in pairs.examples] == [("a.jpg", ("one", "one", "two"))]
    assert pairs.notes == ("copies of an image, captions merged into the first: 1",)


def test_an_image_in_two_splits_stays_in_the_first(root):
    (root / "copy.jpg").write_bytes((root / "a.jpg").read_bytes())
    pairs = pairs_of(root, entry("a.jpg", "one"), entry("copy.jpg", "two", split="test"))
    assert [(e.split, e.captions) for e in pairs.examples] == [("train", ("one",))]
    assert pairs.notes == ("copies of an image in another split (a leak), left out: 1",)


def test_drawn_splits_follow_content_and_are_said(tmp_path):
    for number in range(400):
        (tmp_path / f"{number}.jpg").write_bytes(str(number).encode())
    entries = [entry(f"{number}.jpg", "x", split=None) for number in range(400)]
    one = pairs_of(tmp_path, *entries)
    random.Random(0).shuffle(entries)
    (tmp_path / "0.jpg").rename(tmp_path / "renamed.jpg")
    entries = [e for e in entries if e.path != "0.jpg"]
    other = pairs_of(tmp_path, entry("renamed.jpg", "x", split=None), *entries)
    assert one.digest() == other.digest()
    assert one.notes == ("images without a split, drawn 80/10/10 by content: 400",)
    assert 290 < one.splits["train"] < 350
    assert 20 < one.splits["val"] < 60


def test_odd_names_are_read(root):
    names = [os.fsdecode(b"\xff\xfe.jpg"), "new\nline.jpg", "\u202eright.jpg", "é" * 120 + ".jpg"]
    for number, name in enumerate(names):
        (root / name).write_bytes(bytes([number]))
    pairs = pairs_of(root, *(entry(name, "x") for name in names))
    assert [example.path for example in pairs.examples] == names
    for example in pairs.examples:
        assert image_id(pairs.read(example)) == example.image_id


def test_a_file_that_goes_later_is_an_image_error(root):
    pairs = pairs_of(root, entry("a.jpg", "x"))
    (root / "a.jpg").unlink()
    with pytest.raises(ImageError, match=r"a\.jpg: cannot be read \(No such file"):
        pairs.read(pairs.examples[0])
    os.mkfifo(root / "a.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        pairs.read(pairs.examples[0])
