"""Parquet, Arrow and the hub: what is wrong with a file, a column, a row."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosstill import data
from crosstill.errors import ConfigError, DataError, ImageError


def parquet(path: Path, rows: list[dict], **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def row(number: int, **changes: object) -> dict:
    return {"image": f"image {number}".encode() * 9, "caption": f"caption {number}", **changes}


def reasons(pairs: data.Pairs) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in pairs.quarantine.rows}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"picture": "a", "caption": "x"}], r"no column image among its columns \(picture, cap"),
        ([{"image": b"a", "title": "x"}], r"no column caption among its columns \(image, title\)"),
        ([{"image": b"a", "caption": 7}], "row 0: a caption is the int 7"),
        ([{"image": b"a", "captions": [{"raw": "x"}]}], "row 0: a caption is an object"),
        ([row(0, split="train"), row(1, split="trian")], "row 1: unknown split 'trian'"),
        ([row(0, split=1)], "row 0: 'split' holds the int 1"),
    ],
)
def test_wrong_columns(rows, message, tmp_path):
    path = parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=message) as caught:
        data.open(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1" * 50, b"\xff" * 500])
def test_what_is_no_table_says_so(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*; write or download"):
        data.open(tmp_path / name)


def test_a_cut_parquet_file_says_so(tmp_path):
    path = parquet(tmp_path / "a.parquet", [row(n) for n in range(50)])
    for length in (10, 300, path.stat().st_size - 1):
        os.truncate(path, length)
        with pytest.raises(DataError, match="cannot be read"):
            data.open(path)
        parquet(path, [row(n) for n in range(50)])


def test_a_table_without_rows_says_so(tmp_path):
    table = pa.Table.from_pylist([row(0)]).slice(0, 0)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no images in it"):
        data.open(tmp_path / "a.parquet")


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_rows_without_an_image_are_set_apart(compression, tmp_path):
    rows = [row(0), row(1, image=None), row(2, image=b""), row(3)]
    pairs = data.open(parquet(tmp_path / "a.parquet", rows, compression=compression))
    assert [e.captions for e in pairs.examples] == [("caption 0",), ("caption 3",)]
    assert sorted(reasons(pairs).values()) == ["empty file", "no image in its column"]
    with pytest.raises(ImageError, match=r"no image in its column|empty file"):
        data.open(tmp_path / "a.parquet", strict=True)


def test_names_tell_copies_from_rows_of_one_image(tmp_path):
    rows = [
        row(0, filename="a.jpg"),
        row(0, filename="a.jpg", caption="more"),
        row(0, filename="b.jpg", caption="copy"),
    ]
    pairs = data.open(parquet(tmp_path / "a.parquet", rows))
    assert [e.captions for e in pairs.examples] == [("caption 0", "more", "copy")]
    assert [copy.path.rpartition("/")[2] for copy in pairs.copies] == ["b.jpg"]


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_encoding_is_read_again(dictionary, compression, version, tmp_path, monkeypatch):
    monkeypatch.setattr("crosstill.data.parquet.ROWS", 5)
    rows = [
        row(n, image={"path": f"{n}.jpg", "bytes": os.urandom(50_000 if n % 7 else 3)})
        for n in range(60)
    ]
    rows[40]["image"] = rows[3]["image"]
    path = parquet(
        tmp_path / "a.parquet",
        rows,
        compression=compression,
        use_dictionary=dictionary,
        data_page_version=version,
        row_group_size=25,
    )
    pairs = data.open(path)
    assert len(pairs) == 59
    for example in pairs.examples[::-1]:
        number = int(example.captions[0].split()[1])
        assert pairs.read(example) == rows[number]["image"]["bytes"]
        assert ("+" in example.path) == (compression == "none")


def test_numbered_caption_columns(tmp_path):
    rows = [{"image": b"a", "caption_0": "one", "caption_1": "two", "caption_2": None}]
    pairs = data.open(parquet(tmp_path / "a.parquet", rows))
    assert pairs.examples[0].captions == ("one", "two")


def test_rows_that_name_files(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"a")
    path = parquet(tmp_path / "a.parquet", [{"filepath": "a.jpg", "caption": "x"}])
    pairs = data.open(path, images=tmp_path / "photos")
    assert pairs.read(pairs.examples[0]) == b"a"
    with pytest.raises(DataError, match=r"row 0: missing image file .*a\.jpg"):
        data.open(path)


def test_large_compressed_row_groups_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("crosstill.data.parquet.LARGE", 2**20)
    rows = [row(n, image=os.urandom(2**18), split="train") for n in range(9)]
    slow = data.open(parquet(tmp_path / "a.parquet", rows))
    assert slow.notes == (
        "compressed row groups of up to 2 MB, slow to read at random; "
        "write the image column without compression",
    )
    assert data.open(parquet(tmp_path / "a.parquet", rows, compression="none")).notes == ()
    assert data.open(parquet(tmp_path / "a.parquet", rows, row_group_size=2)).notes == ()


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_table_that_changed_later_is_an_image_error(compression, tmp_path):
    rows = [row(n) for n in range(30)]
    pairs = data.open(parquet(tmp_path / "a.parquet", rows, compression=compression))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ImageError, match="No such file"):
        pairs.read(pairs.examples[0])


def test_compressed_arrow_is_refused(tmp_path):
    table = pa.Table.from_pylist([row(n, image=b"abc" * 9999) for n in range(3)])
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"a\.arrow: compressed Arrow"):
        data.open(tmp_path / "a.arrow")


def test_a_saved_folder_that_is_none_says_so(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"file": 1}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json: not as `save_to_disk` writes it"):
        data.open(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(DataError, match=r"gone\.arrow: cannot be read"):
        data.open(tmp_path)


def test_the_hub_without_a_network_is_one_line(monkeypatch):
    import datasets

    def offline(*_: object) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"^hf:a/b: cannot be loaded \(ConnectionError: Couldn't re"
    ):
        data.open("hf:a/b")


def test_the_hub_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"hf:a/b needs datasets; .* 'crosstill\[hub\]'"):
        data.open("hf:a/b")
