"""What a user may write for a dataset, and which files that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosstill import data
from crosstill.data.fileset import locate
from crosstill.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    names = ["a.tar", "b.tar", "c.txt", "x,y.tar", "00008.tar", "00009.tar", "00010.tar"]
    for name in [*names, "train/0.tar", "val/0.tar", "odd{1}.tar"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("x,y.tar", ["x,y.tar"]),
        ("odd{1}.tar", ["odd{1}.tar"]),
        ("{a,b}.tar", ["a.tar", "b.tar"]),
        ("{00008..00010}.tar", ["00008.tar", "00009.tar", "00010.tar"]),
        ("[ab].tar", ["a.tar", "b.tar"]),
        ("{train,val}/*.tar", ["train/0.tar", "val/0.tar"]),
    ],
)
def test_patterns(pattern, found, root):
    fileset = locate(f"{root}/{pattern}")
    assert [str((fileset.base / name).relative_to(root)) for name in fileset.names] == found


def test_commas_join_patterns_and_repeat_nothing(root):
    fileset = locate(f"{root}/b.tar,{root}/{{a,b}}.tar, {root}/val/*.tar")
    assert (fileset.base, fileset.names) == (root, ("b.tar", "a.tar", "val/0.tar"))
    assert fileset.where("a.tar", "row 3") == "a.tar, row 3"
    assert fileset.origin == root


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gone.tar", r"gone\.tar: no such file or folder"),
        ("*.zip", r"\*\.zip: no such file or folder"),
        ("{a,gone}.tar", r"gone\.tar: no such file or folder"),
        ("{00009..00011}.tar", r"00011\.tar: no such file or folder"),
        ("a.tar,{0}/train", r"train: a folder among files"),
    ],
)
def test_what_is_not_there_is_named(pattern, message, root):
    with pytest.raises(DataError, match=message):
        locate(f"{root}/{pattern.replace('{0}', str(root))}")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("coco_retrieval.train.jsonl", "train"),
        ("captions_val2014.json", "val"),
        ("validation-00000-of-00001.parquet", "val"),
        ("test/000.tar", "test"),
        ("dev_000001.tar", "val"),
        ("train_test.tar", None),
        ("trains.tar", None),
        ("000.tar", None),
        ("latest.tar", None),
    ],
)
def test_a_name_says_the_split(name, split, tmp_path):
    assert locate(str(tmp_path)).split(name) == split


def test_a_folder_outside_the_dataset_says_no_split(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/pairs.csv").touch()
    fileset = locate(str(tmp_path / "test/pairs.csv"))
    assert fileset.split(fileset.names[0]) is None


def test_a_folder_of_several_index_files_asks_which(tmp_path):
    for name in ("vqa.train.jsonl", "coco.train.jsonl", "coco.val.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"files of coco, vqa; name those of one, such as .*coco"):
        data.open(tmp_path)
    assert locate(f"{tmp_path}/coco.*.jsonl").names == ("coco.train.jsonl", "coco.val.jsonl")


def test_locate_several_kinds_are_refused(tmp_path):
    for name in ("a.csv", "b.json"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"several kinds \(\.csv, \.json\)"):
        data.open(f"{tmp_path}/a.csv,{tmp_path}/b.json")
