"""Names and texts as people have them mean the same in every form of a dataset and in an index."""

import csv
import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosstill import data, formats, pixels
from crosstill.data.shards import stream
from crosstill.formats import by_length, encodable
from verbs import crosstill, refusal

TWO_LINES = ("A dog runs{}on grass", "A second one")
NO_LINE_ENDS = ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c"]
RAWS = (
    *("cr2", "cr3", "crw", "nef", "nrw", "arw", "sr2", "srf", "dng", "raf", "orf", "rw2", "pef"),
    *("srw", "x3f", "3fr", "iiq", "kdc", "dcr", "mrw", "erf", "mos"),
)
OTHERS = ("heic", "HEIF", "avif", "jxl", "jp2", "j2k", "jpx", "psd", "tga")


def picture(number: int, form: str = "JPEG") -> bytes:
    colour = (40 * number % 256, 90, 200 - 20 * number)
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, form)
    return file.getvalue()


def put(root: Path, members: dict[str, bytes | str]) -> Path:
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tar(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def captions(source: Path) -> dict[str, tuple[str, ...]]:
    """Captions by the file name of the image."""
    return {e.path.rpartition("/")[2]: e.captions for e in data.open(source).examples}


def left_out(rows) -> dict[str, tuple[str, int]]:
    return {row["path"].rpartition("/")[2]: (row["class"], row["bytes"]) for row in rows}


def forms(root: Path, members: dict[str, bytes | str]) -> list[Path]:
    """The same files as a folder and as a shard."""
    return [put(root / "folder", members), tar(root / "shard.tar", dict(sorted(members.items())))]


def test_endings_of_all_formats_that_pillow_reads_here_are_photos():
    Image.init()
    known = Image.registered_extensions()
    assert {end for end, kind in known.items() if kind in pixels.FORMATS} <= formats.PHOTOS
    assert not formats.PHOTOS & formats.UNSUPPORTED.keys()
    assert {f".{end.lower()}" for end in (*RAWS, *OTHERS)} <= formats.UNSUPPORTED.keys()


def test_only_line_ends_end_a_caption(tmp_path):
    members: dict[str, bytes | str] = {}
    for number, mark in enumerate(NO_LINE_ENDS):
        members[f"{number}.jpg"] = picture(number)
        end = ("\n", "\r\n", "\r")[number % 3]
        members[f"{number}.txt"] = "\ufeff" + end.join(TWO_LINES).format(mark) + end
    expected = {
        f"{number}.jpg": (TWO_LINES[0].format(mark), TWO_LINES[1])
        for number, mark in enumerate(NO_LINE_ENDS)
    }
    for source in forms(tmp_path, members):
        assert captions(source) == expected


def test_lines_of_jsonl_end_as_lines_of_texts_do(tmp_path):
    put(tmp_path, {"a.jpg": picture(1), "b.jpg": picture(2)})
    rows = [json.dumps({"file": f"{n}.jpg", "caption": f"of {n}\u2028"}) for n in "ab"]
    for end in ("\n", "\r\n", "\r"):
        put(tmp_path, {"list.jsonl": "\ufeff" + end.join(rows)})
        assert captions(tmp_path / "list.jsonl") == {"a.jpg": ("of a",), "b.jpg": ("of b",)}


def test_hidden_files_are_passed_over(tmp_path):
    members = {
        "a.jpg": picture(1),
        "a.txt": "one",
        "._a.jpg": b"\0\5\x16\7",
        "._a.txt": b"\0\5\x16\7\xff\xfe",
        "__MACOSX/._a.jpg": b"\0\5\x16\7",
        "__MACOSX/a.txt": b"\xff",
        ".DS_Store": b"\0",
        ".trash/b.jpg": picture(2),
    }
    for source in forms(tmp_path, members):
        pairs = data.open(source)
        assert captions(source) == {"a.jpg": ("one",)}
        assert not len(pairs.quarantine)


def test_hidden_shards_and_endings_in_any_case(tmp_path):
    (tmp_path / "s").mkdir()
    tar(tmp_path / "s/0.TAR", {"a.JPG": picture(1), "a.TXT": "one"})
    put(tmp_path / "s", {"._0.TAR": b"\0\5\x16\7"})
    assert captions(tmp_path / "s") == {"a.JPG": ("one",)}
    put(tmp_path / "p", {"a.JPG": picture(1), "a.TXT": "one"})
    assert captions(tmp_path / "p") == {"a.JPG": ("one",)}
    put(tmp_path / "m", {"a.JPG": picture(1), "Metadata.CSV": "file_name,text\na.JPG,one\n"})
    assert captions(tmp_path / "m") == {"a.JPG": ("one",)}


@pytest.mark.parametrize(("listed", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_listed_photo_in_another_unicode_form_is_found(tmp_path, listed, written):
    names = ["é/한국어.png", "naïve.png", "plain.png"]
    for number, name in enumerate(names):
        path = tmp_path / unicodedata.normalize(written, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))
    rows = [f"{unicodedata.normalize(listed, name)},a caption" for name in names]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    pairs = data.open(tmp_path / "t.csv")
    assert len([pairs.read(example) for example in pairs.examples]) == 3
    assert not pairs.quarantine.rows


def test_a_caption_in_another_unicode_form_is_found(tmp_path):
    name = "café résumé"
    for photo, text in (("NFC", "NFD"), ("NFD", "NFC")):
        members = {
            unicodedata.normalize(photo, name) + ".jpg": picture(1),
            unicodedata.normalize(text, name) + ".txt": "one",
        }
        for source in forms(tmp_path / photo, members):
            assert list(captions(source).values()) == [("one",)]


def test_every_text_that_is_no_utf8_is_named_and_costs_no_other_file(tmp_path):
    members: dict[str, bytes | str] = {f"{n}.jpg": picture(ord(n)) for n in "abc"}
    members |= {"a.txt": "café".encode("latin-1"), "b.txt": b"\xff\xfeA\0", "c.txt": "good"}
    for source in forms(tmp_path, members):
        assert captions(source) == {"a.jpg": (), "b.jpg": (), "c.jpg": ("good",)}
        rows = data.open(source).quarantine.rows
        told = {row["path"].rpartition("/")[2]: row["reason"] for row in rows}
        assert told == {
            "a.txt": "corrupt captions: not UTF-8",
            "b.txt": "corrupt captions: not UTF-8",
        }
        assert left_out(rows)["a.txt"] == ("damaged", 4)


def test_formats_that_are_not_read_are_listed_by_every_form(tmp_path):
    members: dict[str, bytes | str] = {"a.jpg": picture(1), "a.txt": "one"}
    bad = [f"x{n}.{end}" for n, end in enumerate((*RAWS, *(raw.upper() for raw in RAWS), *OTHERS))]
    for number, name in enumerate(bad):
        # a raw file is a TIFF to those who look inside, with a small picture in it
        members[name] = picture(number, "TIFF")
        members[f"x{number}.txt"] = "left out"
    folder, shard = forms(tmp_path, members)
    listed = {n: content for n, content in members.items() if not n.endswith(".txt")}
    table = tmp_path / "folder/list.csv"
    put(tmp_path / "folder", {"list.csv": "file,caption\n" + "".join(f"{n},x\n" for n in listed)})
    column = [{"bytes": content, "path": name} for name, content in listed.items()]
    parquet = tmp_path / "list.parquet"
    pq.write_table(pa.table({"image": column, "caption": ["x"] * len(column)}), parquet)
    expected = {name: ("unsupported-format", len(members[name])) for name in bad}
    for source in (folder, shard, table, parquet):
        pairs = data.open(source)
        assert [e.path.rpartition("/")[2] for e in pairs.examples] == ["a.jpg"]
        assert left_out(pairs.quarantine.rows) == expected
        assert not [note for note in pairs.notes if "without an image" in note]
    crosstill("cache", "none", folder, "--out", tmp_path / "cache")
    lines = (tmp_path / "cache/quarantine.jsonl").read_text().split("\n")
    assert left_out(json.loads(line) for line in lines if line) == expected


def test_an_mpo_is_a_jpeg(tmp_path):
    members = {"a.jpg": picture(1), "a.txt": "one", "two.MPO": picture(2), "two.txt": "two"}
    for source in forms(tmp_path, members):
        assert captions(source) == {"a.jpg": ("one",), "two.MPO": ("two",)}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            ["photo.v2.jpg", "photo.v2.txt", "photo.v3.jpg", "photo.v3.txt"],
            {"photo.v2.jpg": ("photo.v2",), "photo.v3.jpg": ("photo.v3",)},
        ),
        (  # members of one key in another order
            ["photo.v2.jpg", "photo.v3.jpg", "photo.v2.txt", "photo.v3.txt"],
            {"photo.v2.jpg": ("photo.v2",), "photo.v3.jpg": ("photo.v3",)},
        ),
        (  # as tar --sort=name has them
            ["x.jpg", "x.k.jpg", "x.k.txt", "x.txt"],
            {"x.jpg": ("x",), "x.k.jpg": ("x.k",)},
        ),
        (["photo.v2.jpg", "photo.v2.txt", "photo.v3.txt"], {"photo.v2.jpg": ("photo.v2",)}),
        (
            ["2024.01.02 b.jpg", "2024.01.02 b.txt", "2024.01.03.jpg", "2024.01.03.txt"],
            {"2024.01.02 b.jpg": ("2024.01.02 b",), "2024.01.03.jpg": ("2024.01.03",)},
        ),
        (["a.v1.jpg", "a.txt"], {"a.v1.jpg": ("a",)}),
        # a key's text is of none of its several images
        (["a.v1.jpg", "a.v1.txt", "a.v2.jpg", "a.txt"], {"a.v1.jpg": ("a.v1",), "a.v2.jpg": ()}),
    ],
)
def test_texts_go_to_the_image_of_their_own_name(members, expected, tmp_path):
    parts = {
        name: Path(name).stem if name.endswith(".txt") else picture(number)
        for number, name in enumerate(members)
    }
    path = tar(tmp_path / "0.tar", parts)
    assert captions(path) == expected
    texts = sum(name.endswith(".txt") for name in members)
    lost = texts - sum(map(len, expected.values()))
    notes = [note for note in data.open(path).notes if note.startswith("captions without")]
    assert notes == ([f"captions without an image beside them in the shard: {lost}"] * (lost > 0))
    whole = list(stream(path))
    for number, sample in enumerate(whole):
        assert list(stream(path, start=sample.start)) == whole[number:]
        assert list(stream(path, start=sample.next)) == whole[number + 1 :]


@pytest.fixture
def photos(tmp_path) -> Path:
    return put(tmp_path, {f"{name}.jpg": picture(n) for n, name in enumerate("abcde")})


@pytest.mark.parametrize(("ending", "tab"), [("tsv", "\t"), ("csv", ",")])
def test_rows_that_an_unpaired_quote_swallows_are_named(ending, tab, photos):
    rows = ["file|caption", "a.jpg|one", 'b.jpg|"A dog', "c.jpg|A cat", 'd.jpg|A boat"', "e.jpg|x"]
    path = photos / f"t.{ending}"
    path.write_text("\n".join(rows).replace("|", tab) + "\n")
    message = refusal("doctor", path)
    assert f"t.{ending}, row 3: a quote opens there and closes in row 5" in message
    assert "row 4 between them is one of its own (c.jpg)" in message


def test_a_field_over_several_lines_is_a_finding(photos):
    path = photos / "t.csv"
    path.write_text('file,caption\na.jpg,one\nb.jpg,"two,\nand more"\nc.jpg,three\n')
    assert captions(path)["b.jpg"] == ("two,\nand more",)
    done = crosstill("doctor", path)
    assert "run over several lines between quotes, first lines 3 to 4 of t.csv" in done.stdout


def test_a_quote_in_a_long_table_is_named_where_it_opens(photos):
    rows = [f"a.jpg\t{'word ' * 20}{n}" for n in range(6000)]
    rows[100] = 'a.jpg\t"A quote'
    path = photos / "t.tsv"
    path.write_text("\n".join(["file\tcaption", *rows]) + "\n")
    assert "t.tsv, row 102: a quote opens there that closes no field" in refusal("doctor", path)
    path.write_text(f"file\tcaption\na.jpg\tone\nb.jpg\t{'x' * 140_000}\n")
    assert "t.tsv, row 3: field larger than field limit" in refusal("doctor", path)


def test_an_empty_column_leaves_the_word_to_the_next(photos):
    path = photos / "t.csv"
    path.write_text("image,filename,caption,text\n,a.jpg,,one\nb.jpg,,two,\n ,c.jpg, ,three\n")
    assert captions(path) == {"a.jpg": ("one",), "b.jpg": ("two",), "c.jpg": ("three",)}
    path.write_text("image,filename,caption\n,,one\n")
    assert "row 2: no image in its columns (image, filename)" in refusal("doctor", path)


LISTS = {
    "['A man', \"Someone's\"]": ("A man", "Someone's"),
    '["A man", "S\\u00f6me"]': ("A man", "Söme"),
    "[A man]": ("[A man]",),
    "[1, 2]": ("[1, 2]",),
    "[] a": ("[] a",),
}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "shard"])
def test_lists_in_a_text_are_their_captions(form, photos):
    names, path = [f"{name}.jpg" for name in "abcde"], photos / f"t.{form}"
    rows = list(zip(names, LISTS, strict=True))
    if form in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if form == "csv" else "\t")
            writer.writerows([("file", "caption"), *rows])
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps({"file": n, "caption": c}) for n, c in rows))
    elif form == "parquet":
        contents = [(photos / name).read_bytes() for name in names]
        cells = [{"bytes": c, "path": n} for n, c in zip(names, contents, strict=True)]
        pq.write_table(pa.table({"image": cells, "caption": list(LISTS)}), path)
    else:
        members: dict[str, bytes | str] = {}
        for name, text in rows:
            members[name] = (photos / name).read_bytes()
            members[f"{name[0]}.json"] = json.dumps({"caption": text})
        path = tar(photos / "t.tar", members)
    assert list(captions(path).values()) == list(LISTS.values())
    assert any(
        "lists of captions written as one text" in n and n.endswith(": 2")
        for n in data.open(path).notes
    )


def test_names_of_splits_meet_in_any_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
    put(tmp_path, {nfd: picture(1), "b.jpg": picture(2)})
    put(tmp_path, {"t.csv": f"file,caption\n{nfd},one\nb.jpg,two\n"})
    images = [{"filename": nfc, "split": "val"}, {"filename": "b.jpg", "split": "test"}]
    put(tmp_path, {"splits.json": json.dumps({"images": images})})
    pairs = data.open(tmp_path / "t.csv", splits=tmp_path / "splits.json")
    assert pairs.splits == {"val": 1, "test": 1}


def test_a_listing_of_vectors_is_read_as_other_texts(photos):
    nfc, nfd = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    put(photos, {nfd: picture(9)})
    texts = ["A man", "a\u2028b", "c", "d", "e", "f"]
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    rows = zip([*names, nfd], texts, strict=True)
    put(photos, {"t.csv": "file,caption\n" + "".join(f"{n},{t}\n" for n, t in rows)})
    vectors = photos / "vectors"
    put(vectors, {"filenames.txt": "\ufeff" + "\r\n".join([*names, nfc]), "._image.npy": b"\0"})
    put(vectors, {"captions.txt": "\ufeff" + "\n".join(texts) + "\n"})
    random = np.random.default_rng(0)
    np.save(vectors / "image.npy", random.normal(size=(6, 4)).astype(np.float32))
    np.save(vectors / "text.npy", random.normal(size=(6, 4)).astype(np.float32))
    done = crosstill("cache", vectors, photos / "t.csv", "--out", photos / "cache")
    assert "6 images" in done.stdout and "unreadable" not in done.stderr
    put(vectors, {"filenames.txt": "\n".join("abcdef")})
    message = refusal("cache", vectors, photos / "t.csv", "--out", photos / "other")
    assert "none of the 6 names in" in message
    assert "vectors/filenames.txt is a file name of the dataset; the first is 'a'" in message
    put(vectors, {"filenames.txt": b"caf\xe9.jpg\n"})
    assert "filenames.txt, line 1: not UTF-8" in refusal(
        "cache", vectors, photos / "t.csv", "--out", photos / "other"
    )


@given(st.lists(st.integers(0, 5)), st.integers(1, 4))
def test_rows_go_from_short_to_long_each_once_in_chunks_of_the_size(lengths, size):
    chunks = by_length(lengths, size)
    order = [row for chunk in chunks for row in chunk]
    assert order == sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    assert all(len(chunk) == size for chunk in chunks[:-1]) and all(chunks)


def test_lone_surrogates_become_question_marks():
    assert encodable("a\udcffb é 🐕") == "a?b é 🐕"
