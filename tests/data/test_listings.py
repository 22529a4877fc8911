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
        (json.dumps({"images": [image(), image(filename="z.jpg")]}), "images[1]: missing image"),
    ],
)
def test_wrong_json(content, message, root):
    assert message in refused(root / "list.json", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column filepath, caption"),
        ("filepath,title\na.jpg,cat\n", "no column caption in its header (filepath, title)"),
        ("filepath,caption\n", "no images in it"),
        ("filepath,caption\na.jpg,a cat, a dog\n", "row 2: 3 fields under 2 columns"),
        ("filepath,caption\na.jpg\n", "row 2: 1 fields under 2 columns"),
        (
            'filepath,caption\na.jpg,"a cat\nb.jpg,two\n',
            "row 2: a quote opens there that closes no field up to row 3",
        ),
        ('filepath,caption\na.jpg,"a" cat\n', "row 2:"),
        (b"filepath,caption\na.jpg,caf\xe9\n", "line 2: not UTF-8"),
        ("filepath,caption\na.jpg,one\nz.jpg,two\n", "row 3: missing image file"),
        ("filepath,caption\n,one\n", "row 2: no image in its columns (filepath)"),
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
        "b.jpg": (),
        "c.jpg": (),
        "sub/d.PNG": ("three",),
    }
    assert {row["path"]: row["reason"] for row in pairs.quarantine.rows} == {
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


def test_caption_files_that_are_no_utf8_are_all_named_and_the_rest_is_used(root):
    (root / "a.txt").write_bytes(b"fine\n\xff\xfe")
    (root / "b.txt").write_bytes(b"caf\xe9")
    (root / "c.txt").write_text("one")
    pairs = data.open(root)
    assert [e.captions for e in pairs.examples] == [(), (), ("one",)]
    rows = [(row["path"], row["reason"], row["bytes"]) for row in pairs.quarantine.rows]
    assert rows == [
        ("a.txt", "corrupt captions: not UTF-8", 7),
        ("b.txt", "corrupt captions: not UTF-8", 4),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "line 1: bad JSON"),
        ('{"file": "a.jpg", "caption": "x"}\n\n{"file": }\n', "line 3: bad JSON"),
        ("[" * 100_000, "line 1: bad JSON (nested too deep)"),
        ("[1]\n", "line 1: no JSON object"),
        (b'{"file": "a.jpg", "caption": "caf\xe9"}\n', "line 1: not UTF-8"),
        ('{"url": "a.jpg", "caption": "x"}\n', "line 1: no filepath among its keys (url, caption)"),
        ('{"file": "a.jpg", "title": "x"}\n', "line 1: no caption among its keys (file, title)"),
        ('{"file": 3, "caption": "x"}\n', "line 1: 'filepath' holds the int 3"),
        ('{"file": "a.jpg", "caption": ["x", 1]}\n', "line 1: a caption is the int 1"),
        ('{"file": "a.jpg", "caption": {"raw": "x"}}\n', "line 1: a caption is an object"),
        ('{"file": "a.jpg", "caption": "x", "split": "tst"}\n', "line 1: unknown split 'tst'"),
        ('{"file": "a.jpg", "caption": "x", "split": 1}\n', "line 1: 'split' holds the int 1"),
        ('{"file": "z.jpg", "caption": "x"}\n', "line 1: missing image file"),
        ('{"file": "", "caption": "x"}\n', "line 1: no image in its columns"),
        ("", "no images in it"),
        ('{"image_path": "a.jpg", "text_segment": {}}\n', "line 1: 'text_segment' is no list of"),
        ('{"image_path": "a.jpg", "text_segment": [1, "a"]}\n', "line 1: 'text_segment' is no li"),
        ('{"image_path": "a.jpg", "text_segment": [5]}\n', "line 1: captions are token ids; put"),
        ('{"text_segment": ["a"]}\n', "line 1: no image in its columns"),
    ],
)
def test_wrong_jsonl(content, message, root):
    assert message in refused(root / "list.jsonl", content)


def test_tokens_that_are_not_of_the_vocabulary(root):
    (root / "beit3.spm").write_bytes(b"no model")
    content = '{"image_path": "a.jpg", "text_segment": [5]}\n'
    path = root / "list.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"beit3\.spm: not a SentencePiece model"):
        data.open(path)


def test_token_ids_without_a_piece(root):
    import sentencepiece

    with (root / "beit3.spm").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["one cat", "two cats"] * 9),
            model_writer=file,
            vocab_size=14,
            minloglevel=2,
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(root / "beit3.spm"))
    ids = [number + 1 for number in model.encode("two cats")]
    line = {"image_path": "a.jpg", "text_segment": [*ids, 3], "image_id": 0}
    (root / "c.jsonl").write_text(json.dumps(line))
    pairs = data.open(root / "c.jsonl", images=root)
    assert pairs.examples[0].captions == ("two cats?",)
    assert pairs.notes[1:] == (
        "captions rebuilt from tokens, which keep no double spaces: 1",
        "captions with a token that beit3.spm does not know, each now a '?': 1",
    )
    for token in (0, 2, 15, -4):
        (root / "c.jsonl").write_text(json.dumps(line | {"text_segment": [token]}))
        with pytest.raises(DataError, match=f"line 1: token {token} is not of this beit3.spm"):
            data.open(root / "c.jsonl")


def test_beit3_text_is_taken_as_it_is_and_counts_anew_in_every_split(root):
    for split, name in (("train", "a"), ("val", "b")):
        line = {"image_path": f"{name}.jpg", "text_segment": f"of {name}", "image_id": 0}
        (root / f"c.{split}.jsonl").write_text(json.dumps(line) + "\n")
    pairs = data.open(f"{root}/c.*.jsonl")
    assert [(e.captions, e.split) for e in pairs.examples] == [
        (("of a",), "train"),
        (("of b",), "val"),
    ]
    assert data.open(root / "c.val.jsonl").splits == {"val": 1}


def coco(**changes: object) -> dict:
    return {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}],
        **changes,
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (coco(images=[{"file_name": "a.jpg"}]), "images[0]: no number under 'id'"),
        (coco(images=[{"id": 1}, {"id": 2}]), "images[0]: no text under 'file_name'"),
        (coco(annotations={}), "'annotations' is no list"),
        (coco(annotations=[{"caption": "x"}]), "annotations[0]: no number under 'image_id'"),
        (coco(annotations=[{"image_id": 1}]), "annotations[0]: no text under 'caption'"),
        (coco(annotations=[{"image_id": 9, "caption": "x"}]), "annotations[0]: image_id 9 is not"),
        (coco(images=[]), "annotations[0]: image_id 1 is not among 'images'"),
    ],
)
def test_wrong_coco(value, message, root):
    assert message in refused(root / "captions_val2014.json", json.dumps(value))


def test_coco_alone_is_the_split_of_its_name(root):
    (root / "captions_val2014.json").write_text(json.dumps(coco()))
    assert data.open(root / "captions_val2014.json").splits == {"val": 2}


def test_karpathys_file_decides_the_splits_of_any_listing(root):
    (root / "list.csv").write_text("filepath,caption,split\na.jpg,x,val\nb.jpg,y,val\n")
    items = [
        {"filename": "a.jpg", "split": "restval"},
        {"filename": "z.jpg", "split": "test"},
    ]
    (root / "s.json").write_text(json.dumps({"images": items}))
    pairs = data.open(root / "list.csv", splits=root / "s.json")
    assert [(e.path, e.split) for e in pairs.examples] == [("a.jpg", "train")]
    assert pairs.notes == (
        "images that s.json does not name, left out: 1",
        "images of s.json that are not in the dataset: 1",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no list named 'images'; --splits is a file in Karpathy's layout"),
        ({"images": [{"filename": "a.jpg"}]}, "images[0]: no text under 'filename' or 'split'"),
        ({"images": [{"filename": "a.jpg", "split": "x"}]}, "images[0]: unknown split 'x'"),
        ({"images": [{"filename": "q", "split": "val"}]}, "names none of the 1 images"),
    ],
)
def test_wrong_splits(value, message, root):
    (root / "list.csv").write_text("filepath,caption\na.jpg,x\n")
    (root / "s.json").write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        data.open(root / "list.csv", splits=root / "s.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(root / "s.json"))
    with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
        data.open(root / "list.csv", splits=root / "gone.json")
