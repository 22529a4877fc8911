"""Loose texts: files of a sentence a line."""

import random
from collections import Counter
from pathlib import Path

import pytest

from crosstill.data.texts import LONGEST, LooseTexts, read_texts
from crosstill.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, content: str | bytes, captions: tuple[str, ...] = ()) -> LooseTexts:
    return read_texts([write(path, content)], captions)


def listed(texts: LooseTexts) -> list[str]:
    return texts.take(0, len(texts))


def test_lines_end_as_people_have_them(tmp_path):
    content = "\ufeffa dog\r\n\r\n  a cat \ra bird\u2028 in a tree\n \t \nlast"
    assert set(listed(read(tmp_path / "a.txt", content))) == {
        "a dog",
        "a cat",
        "a bird\u2028 in a tree",
        "last",
    }


def test_a_text_counts_once_and_a_caption_stays_one(tmp_path):
    texts = read(tmp_path / "a.txt", "one\ntwo\none\n\nthree\n two \n", ("three", "four"))
    assert sorted(listed(texts)) == ["one", "two"]
    assert texts.note.endswith("; lines: 6, of which 1 empty, 2 repeated, 1 captions already")


def test_neither_order_nor_files_matter(tmp_path):
    lines = [f"sentence {number}" for number in range(300)]
    whole = read(tmp_path / "a.txt", "\n".join(lines))
    random.Random(0).shuffle(lines)
    halves = [write(tmp_path / f"{n}.txt", "\n".join(lines[n::2])) for n in range(2)]
    for other in (read_texts(halves), read_texts(iter(lines)), read_texts([halves[0], *lines])):
        assert other.digest == whole.digest
        assert listed(other) == listed(whole)
        assert (other.splits == whole.splits).all()
    assert read_texts(lines[1:]).digest != whole.digest


def test_a_tenth_is_held_out_but_no_more_than_a_validation_can_bear():
    texts = read_texts(f"sentence {number}" for number in range(60_000))
    assert Counter(texts.splits.tolist()) == {"val": 5_000, "test": 5_000, "train": 50_000}
    few = read_texts(f"sentence {number}" for number in range(1_000))
    counts = Counter(few.splits.tolist())
    assert 70 < counts["val"] < 130 and 70 < counts["test"] < 130
    # those few are in the same splits among the many
    splits = dict(zip(texts.take(0, len(texts)), texts.splits.tolist(), strict=True))
    moved = [t for t, s in zip(listed(few), few.splits, strict=True) if splits[t] != s]
    assert all(splits[text] == "train" for text in moved)


def test_a_long_line_is_cut_and_told(tmp_path):
    content = "x" * (3 * LONGEST) + "\nshort\n" + "y" * LONGEST + "\n" + "z" * (LONGEST + 1)
    texts = read(tmp_path / "a.txt", content)
    assert sorted(map(len, listed(texts))) == [5, LONGEST, LONGEST, LONGEST]
    assert "2 cut to 4,000 characters" in texts.note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\ncaf\xe9\n", "line 2: not UTF-8 text; save the file as UTF-8"),
        (b"a\r\nb\r\n\xff\xfe", "line 3: not UTF-8"),
        (b"\n \n", "no text in it"),
        (b"", "no text in it"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(content, message, tmp_path):
    with pytest.raises(DataError, match=rf"lines\.txt.*{message}"):
        read(tmp_path / "lines.txt", content)


def test_a_name_of_a_file_is_no_sentence(tmp_path):
    path = write(tmp_path / "lines.txt", "a dog\n")
    for sources in ([str(path)], str(path), path):
        with pytest.raises(DataError, match=r"lines\.txt.*; give (Path|a list)"):
            read_texts(sources)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a regular file"):
        read_texts([tmp_path])
    with pytest.raises(DataError, match="No such file"):
        read_texts([tmp_path / "gone.txt"])
