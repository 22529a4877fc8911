"""One contract for all forms: the same scenes, written each way, are the same dataset."""

from __future__ import annotations

import csv
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest

from crosstill import data
from crosstill.data import scenes
from crosstill.errors import DataError
from crosstill.types import image_id

COUNT = 20
HEADER = ["filepath", "caption", "split"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    scenes.write(root / "karpathy", COUNT, seed=5)
    return root


def items(written: Path) -> list[dict]:
    return json.loads((written / "karpathy/dataset.json").read_text())["images"]


def rows(written: Path) -> list[list[str]]:
    return [
        [item["filename"], sentence["raw"], item["split"]]
        for item in items(written)
        for sentence in item["sentences"]
    ]


def table(path: Path, rows: list[list[str]], header: list[str], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def scenes_form(written: Path) -> data.Pairs:
    return data.open(f"scenes:{COUNT}:5")


def karpathy_form(written: Path) -> data.Pairs:
    return data.open(written / "karpathy/dataset.json")


def coco_form(written: Path) -> data.Pairs:
    coco = [
        {**item, "filepath": "karpathy", "split": item["split"].replace("train", "restval")}
        for item in items(written)
    ]
    (written / "coco.json").write_text(json.dumps({"images": coco}))
    return data.open(written / "coco.json")


def csv_form(written: Path) -> data.Pairs:
    return data.open(table(written / "t.csv", rows(written), HEADER), images=written / "karpathy")


def tsv_form(written: Path) -> data.Pairs:
    path = table(written / "t.tsv", rows(written), HEADER, "\t")
    return data.open(path, images=str(written / "karpathy"))


def named_form(written: Path) -> data.Pairs:
    named = [
        ["" if number % 5 else file, text, split, file]
        for number, (file, text, split) in enumerate(rows(written))
    ]
    path = table(written / "n.csv", named, [*HEADER, "image_id"])
    return data.open(path, images=written / "karpathy")


def folder_form(written: Path) -> data.Pairs:
    for item in items(written):
        folder = written / "folder" / item["split"]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(written / "karpathy" / item["filename"], folder)
        text = "\n".join(sentence["raw"] for sentence in item["sentences"])
        (folder / item["filename"]).with_suffix(".txt").write_text(text + "\n\n")
    return data.open(written / "folder")


FORMS = {
    "scenes": scenes_form,
    "karpathy": karpathy_form,
    "coco": coco_form,
    "csv": csv_form,
    "tsv": tsv_form,
    "named": named_form,
    "folder": folder_form,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_dataset(form, written):
    pairs, model = FORMS[form](written), scenes_form(written)
    told = {e.image_id: (e.captions, e.split) for e in pairs.examples}
    assert told == {e.image_id: (e.captions, e.split) for e in model.examples}
    assert len(pairs) == COUNT
    assert pairs.digest() == model.digest()
    assert pairs.splits == {"train": 16, "val": 2, "test": 2}
    assert (len(pairs.quarantine), pairs.notes) == (0, ())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_bytes_of_its_ids(form, written):
    pairs = FORMS[form](written)
    again = data.reader(json.loads(json.dumps(pairs.source)))
    again = pickle.loads(pickle.dumps(again))
    for example in pairs.examples:
        assert image_id(pairs.read(example)) == example.image_id
        assert again(example) == pairs.read(example)


@pytest.mark.parametrize("form", ["karpathy", "folder"])
def test_a_split_is_a_dataset(form, written):
    val = FORMS[form](written).split("val")
    assert val.splits == {"val": 2}
    assert {e.split for e in val.examples} == {"val"}
    with pytest.raises(DataError, match=r"split 'train' has no images; there are val \(2\)"):
        val.split("train")


def test_digest_knows_content_not_order_or_names(written, tmp_path):
    lines = rows(written)
    one = data.open(table(tmp_path / "a.csv", lines, HEADER), images=written / "karpathy")
    random.Random(1).shuffle(lines)
    other = data.open(table(tmp_path / "b.csv", lines, HEADER), images=written / "karpathy")
    assert one.digest() == other.digest()
    lines[0][1] += " indeed"
    third = data.open(table(tmp_path / "c.csv", lines, HEADER), images=written / "karpathy")
    assert third.digest() != one.digest()


def test_unknown_source_record_is_refused():
    with pytest.raises(DataError, match="form 'tape'"):
        data.reader({"form": "tape"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere.json", "no such file"),
        (lambda p: (p / "a.parquet", (p / "a.parquet").touch())[0], "not a dataset"),
        (lambda p: p, "no images in it"),
    ],
)
def test_what_is_no_dataset_says_so(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        data.open(make(tmp_path))


def test_missing_image_folder_is_named(written, tmp_path):
    with pytest.raises(DataError, match="no such folder of images"):
        data.open(written / "karpathy/dataset.json", images=tmp_path / "gone")


def test_real_dataset(shared: Path, tmp_path):
    file = shared / "flickr8k/dataset_flickr8k.json"
    value = json.loads(file.read_text())
    chosen = [item for item in value["images"] if item["imgid"] % 50 == 0]
    (tmp_path / "part.json").write_text(json.dumps({"dataset": "flickr8k", "images": chosen}))
    pairs = data.open(tmp_path / "part.json", images=shared / "flickr8k/images")
    assert pairs.name == "flickr8k"
    assert len(pairs) == len(chosen)
    assert {len(example.captions) for example in pairs.examples} == {5}
