"""Caches and listings of a stranger: every checksum in them is right."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosstill import cache, files
from crosstill.errors import CorruptError
from verbs import crosstill, refusal


@pytest.fixture
def folder(cached, tmp_path) -> Path:
    return Path(shutil.copytree(cached.folder, tmp_path / "theirs/cache"))


@pytest.fixture
def loose(scenes, teacher, tmp_path) -> Path:
    """A cache with texts that have no photo."""
    texts = (f"a red circle number {number}" for number in range(200))
    return cache.build(teacher, scenes, tmp_path / "theirs/loose", texts=texts).folder


def replaced(folder: Path, table: pa.Table) -> Path:
    """Put another table of loose texts there, with a checksum that is right."""
    pq.write_table(table, folder / "texts.parquet")
    digest = files.digest_file(folder / "texts.parquet")
    sealed(folder, lambda record: record["files"].update({"texts.parquet": digest}))
    return folder


def sealed(folder: Path, edit) -> None:
    record = json.loads((folder / "cache.json").read_text())
    edit(record)
    files.write_json(folder / "cache.json", files.sealed(record))


@pytest.mark.parametrize("name", ["../image-00000.npy", "/etc/hostname", "a/b.npy", ".", ""])
def test_a_cache_names_no_file_elsewhere(folder, name):
    sealed(folder, lambda record: record["shards"]["image"][0].update(file=name))
    with pytest.raises(CorruptError, match=r"cache\.json: shards\.image\.0\.file"):
        cache.open(folder)
    sealed(folder, lambda record: record["shards"]["image"][0].update(file="image-00000.npy"))
    sealed(folder, lambda record: record["files"].update({name: "0" * 64}))
    with pytest.raises(CorruptError, match=r"cache\.json: files"):
        cache.open(folder)


@pytest.mark.parametrize("name", ["images.parquet", "image-00000.npy", "quarantine.jsonl"])
def test_a_link_in_a_cache_is_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    lines = crosstill("train", folder, "--out", tmp_path / "run", code=1).stderr.splitlines()
    assert f"{name}: a link" in lines[-1]


def test_a_table_that_swells_is_refused(folder):
    count = 20_000_000
    table = pa.table({"image": pa.array([0], pa.int32()).take([0] * 1000), "text": ["a"] * 1000})
    schema = table.schema
    with pq.ParquetWriter(folder / "captions.parquet", schema) as writer:
        for _ in range(count // 1_000_000):
            writer.write_table(pa.concat_tables([table] * 1000).combine_chunks())
    digest = files.digest_file(folder / "captions.parquet")
    sealed(folder, lambda record: record["files"].update({"captions.parquet": digest}))
    assert (folder / "captions.parquet").stat().st_size < count
    with pytest.raises(CorruptError, match=rf"captions\.parquet: not readable \({count} rows"):
        cache.open(folder)


def test_few_long_texts_many_times_are_refused(folder):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), ["x" * 100_000])
    table = pa.table({"image": pa.array([0] * 50_000, pa.int32()), "text": text})
    pq.write_table(table, folder / "captions.parquet", store_schema=False)
    digest = files.digest_file(folder / "captions.parquet")
    sealed(folder, lambda record: record["files"].update({"captions.parquet": digest}))
    with pytest.raises(CorruptError, match=r"captions\.parquet: not readable \(5.0 GB of text"):
        cache.open(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 3), ("rows", {"image": "x"}), ("teacher", []), ("data", None), ("shards", {"a": []})],
)
def test_the_fields_of_a_header_have_types(folder, field, value):
    sealed(folder, lambda record: record.update({field: value}))
    with pytest.raises(CorruptError, match=rf"cache\.json: {field}"):
        cache.open(folder)


def test_a_listing_does_not_lead_out_of_the_images(tmp_path):
    (tmp_path / "images").mkdir()
    for place in ("secret.png", "images/a.png"):
        (tmp_path / place).write_bytes(b"not looked at")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "b/../../secret.png"):
        (tmp_path / "pairs.csv").write_text(f"filepath,caption\na.png,one\n{name},two\n")
        said = refusal("doctor", tmp_path / "pairs.csv", "--images", tmp_path / "images")
        assert (f"{name} lies outside of --images" in said and "row" in said) or "line" in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images.parquet", b"\xff\xfe"),
        ("images.parquet", b"bb962d914869b4\x0b3"),
        ("captions.parquet", b"\xff\xfe"),
    ],
)
def test_texts_that_are_no_utf8_and_ids_that_are_no_digests_are_refused(folder, name, text):
    table = pq.read_table(folder / name)
    column = {"images.parquet": "image_id", "captions.parquet": "text"}[name]
    rotten = pa.array([text] * len(table)).view(pa.string())
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, rotten), folder / name)
    digest = files.digest_file(folder / name)
    sealed(folder, lambda record: record["files"].update({name: digest}))
    with pytest.raises(CorruptError, match=rf"{name}: not readable"):
        cache.open(folder)


@pytest.mark.parametrize(
    "source",
    [
        *({"form": "scenes"}, {"form": "scenes", "seed": "x"}, {"form": "scenes", "seed": []}),
        *({"form": "files"}, {"form": "files", "root": 3}, {"form": "packed", "root": "a"}),
    ],
)
def test_a_source_of_wrong_types_is_refused(folder, source):
    sealed(folder, lambda record: record["data"].update(source=source))
    with pytest.raises(CorruptError, match=r"cache\.json: not readable"):
        cache.open(folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": pa.array([b"\xff\xfe"] * 200).view(pa.string()), "split": ["train"] * 200},
            "UTF8",
        ),
        ({"text": [None] * 200, "split": ["train"] * 200}, "no column text of string"),
        ({"text": ["a"] * 200, "split": [*["train"] * 199, None]}, "an empty cell"),
        ({"text": ["a"] * 200, "split": [0] * 200}, "no column split of string"),
        ({"text": ["a"] * 200}, "no column split of string"),
        ({"text": ["a"] * 199, "split": ["train"] * 199}, "its text rows do not add up"),
        ({"text": ["a"] * 201, "split": ["train"] * 201}, "its text rows do not add up"),
        ({"text": ["a"] * 200, "split": ["trian"] * 200}, "unknown split 'trian'"),
        (
            {"text": pa.array(["a"]).take(pa.array([0] * 3_000_000)), "split": ["val"] * 3_000_000},
            r"3000000 rows in",
        ),
    ],
)
def test_a_damaged_table_of_loose_texts_is_refused(loose, columns, message):
    with pytest.raises(CorruptError, match=message):
        cache.open(replaced(loose, pa.table(columns)))


def test_a_cache_without_its_table_of_loose_texts_is_refused(loose):
    path = loose / "texts.parquet"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], b""):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match=r"texts\.parquet: its checksum is wrong"):
            cache.open(loose)
    path.unlink()
    with pytest.raises(CorruptError, match=r"texts\.parquet: the file is missing"):
        cache.open(loose)
    sealed(loose, lambda record: record["files"].pop("texts.parquet"))
    with pytest.raises(CorruptError, match="its text rows do not add up"):
        cache.open(loose)
