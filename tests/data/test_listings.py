"""Wrong JSON, tables and folders: one line that names the file and the row."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from crosstill import data
from crosstill.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    return tmp_path


def refused(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        data.open(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def image(**changes: object) -> dict:
    return {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a cat"}], **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n\n  oops", "line 3: bad JSON"),
        ("[" * 100_000, "bad JSON"),
        ("[]", "no list named 'images'"),
        ('{"images": {}}', "no list named 'images'"),
        ('{"images": []}', "no images in it"),
        (b'{"images": [\n"\xff"]}', "line 2: not UTF-8"),
        (json.dumps({"images": [image(), 7]}), r"images[1]: no text under 'filename'"),
        (json.dumps({"images": [image(filename=None)]}), "images[0]: no text under 'filename'"),
        (json.dumps({"images": [image(split="trian")]}), "images[0]: unknown split 'trian'"),
        (json.dumps({"images": [image(sentences="a")]}), "images[0]: 'sentences' is no list"),
        (json.dumps({"images": [image(sentences=["a"])]}), "images[0].sentences[0]: no text"),
        (json.dumps({"images": [image(sentences=[])]}), "no captions in it"),
        (json.dumps({"images": [image(), image(filename="z.jpg")]}), "images[1]: missing image"),
    ],
)
def test_wrong_json(content, message, root):
    assert message in refused(root / "list.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column filepath, caption"),
        ("filepath,text\na.jpg,cat\n", "no column caption in its header (filepath, text)"),
        ("filepath,caption\n", "no images in it"),
        ("filepath,caption\na.jpg,a cat, a dog\n", "row 2: 3 fields under 2 columns"),
        ("filepath,caption\na.jpg\n", "row 2: 1 fields under 2 columns"),
        ('filepath,caption\na.jpg,"a cat\nb.jpg,two\n', "row 3: unexpected end of data"),
        ('filepath,caption\na.jpg,"a" cat\n', "row 2:"),
        ("filepath,caption\na.jpg,\n", "no captions in it"),
        (b"filepath,caption\na.jpg,caf\xe9\n", "line 2: not UTF-8"),
        ("filepath,caption\na.jpg,one\nz.jpg,two\n", "row 3: missing image file"),
        ("filepath,caption\n,one\n", "row 2: filepath ''"),
        ("filepath,caption,split\na.jpg,one,tst\n", "row 2: unknown split 'tst'"),
        ("filepath,caption,image_id\na.jpg,one,7\nb.jpg,two,7\n", "row 3: filepath 'b.jpg'"),
    ],
)
def test_wrong_table(content, message, root):
    assert message in refused(root / "list.csv", content)


def test_table_with_byte_order_mark_blank_lines_and_quoted_newline(root):
    text = '\ufefffilepath,caption\r\n\r\na.jpg,"a ""big"" cat,\nasleep"\r\nb.jpg,two\r\n'
    (root / "list.csv").write_bytes(text.encode())
    pairs = data.open(root / "list.csv")
    assert [e.captions for e in pairs.examples] == [('a "big" cat,\nasleep',), ("two",)]


def test_one_file_in_two_splits_of_a_table_is_noted(root):
    (root / "list.csv").write_text("filepath,caption,split\na.jpg,one,train\na.jpg,two,val\n")
    pairs = data.open(root / "list.csv")
    assert pairs.splits == {"train": 1}
    assert "leak" in pairs.notes[0]


def test_json_without_splits_draws_them(root):
    items = [{"filename": "a.jpg", "sentences": [{"raw": "a cat"}]}]
    (root / "list.json").write_text(json.dumps({"images": items}))
    assert "images without a split" in data.open(root / "list.json").notes[0]


def test_folder_reports_what_is_odd_and_finishes(root):
    (root / "a.txt").write_text("one\n\n two \n")
    (root / "alone.txt").write_text("no image")
    os.mkfifo(root / "pipe.jpg")
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "sub").mkdir()
    (root / "sub/loop").symlink_to(root)
    (root / "sub/d.PNG").write_bytes(b"d")
    (root / "sub/d.txt").write_text("three")
    (root / "notes.pdf").write_bytes(b"ignored")
    pairs = data.open(root)
    assert {e.path: e.captions for e in pairs.examples} == {
        "a.jpg": ("one", "two"),
        "sub/d.PNG": ("three",),
    }
    assert {row["path"]: row["reason"] for row in pairs.quarantine.rows} == {
        "b.jpg": "no caption",
        "c.jpg": "no caption",
        "gone.jpg": "missing",
        "pipe.jpg": "cannot be read (not a regular file)",
    }
    assert "text files without an image of the same name: 1" in pairs.notes


def test_closed_subfolder_is_reported(root, monkeypatch):
    (root / "a.txt").write_text("one")
    (root / "closed").mkdir()
    plain = os.scandir

    def scandir(path: str):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    rows = {row["path"]: row["reason"] for row in data.open(root).quarantine.rows}
    assert rows["closed"] == "cannot be read (Permission denied)"


def test_caption_file_that_is_not_text_is_named(root):
    (root / "a.txt").write_bytes(b"fine\n\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt, line 2: not UTF-8"):
        data.open(root)


def test_folder_without_captions(root):
    with pytest.raises(DataError, match="no captions in it"):
        data.open(root)
