"""A cache of images in archives and tables is the cache of the same images in files."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosstill import data
from crosstill.cache import Cache, build, pixels
from crosstill.data import scenes as scenery
from crosstill.errors import DataError
from crosstill.images import Preprocess
from support import SmallTeacher

FORMS = ("files", "tar", "parquet", "plain.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("packed")
    scenery.write(home / "files", 60)
    pairs = data.open(home / "files/dataset.json")
    with tarfile.open(home / "pairs.tar", "w") as archive:
        for example in pairs.examples:
            stem = example.path.removesuffix(".png")
            for name, content in (
                (example.path, pairs.read(example)),
                (stem + ".txt", "\n".join(example.captions).encode()),
                (stem + ".json", b'{"split": "%s"}' % example.split.encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    rows = [
        {"image": pairs.read(e), "captions": list(e.captions), "split": e.split}
        for e in pairs.examples
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, home / "pairs.parquet", row_group_size=13)
    pq.write_table(table, home / "pairs.plain.parquet", compression="none")
    return home


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(sys.modules["crosstill.cache.cache_builder"], "SHARD_ROWS", 16)


def opened(home: Path, form: str) -> data.Pairs:
    return data.open(home / ("files/dataset.json" if form == "files" else f"pairs.{form}"))


def rows(folder: Path) -> dict[str, bytes]:
    """What the teacher said and the captions, byte by byte."""
    kinds = (".npy", "captions.parquet", "quarantine.jsonl")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith(kinds)}


def about(cache: Cache) -> dict:
    """The header but for where the images are, and what follows from that."""
    header = dict(cache.header)
    named = {k: v for k, v in header.pop("files").items() if k != "images.parquet"}
    header.pop("sha256")
    known = {k: v for k, v in header.pop("data").items() if k not in ("name", "source")}
    return header | {"files": named, "data": known}


# one archive, and one of columns; the others are read alike
TAR, COLUMNS = FORMS[1], FORMS[-1]
SLOW = [
    pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:] if form not in (TAR, COLUMNS)
]


@pytest.mark.parametrize("form", [TAR, COLUMNS, *SLOW])
def test_the_cache_differs_only_in_where_its_images_are(form, home, tmp_path):
    files = build(SmallTeacher(), opened(home, "files"), tmp_path / "files", views=2)
    cache = build(SmallTeacher(), opened(home, form), tmp_path / form, views=2)
    assert rows(tmp_path / form) == rows(tmp_path / "files")
    assert len(rows(tmp_path / form)) > 8
    assert about(cache) == about(files)
    assert cache.header["data"]["source"] != files.header["data"]["source"]
    assert cache.image_ids == files.image_ids
    assert [path.rpartition("/")[2] for path in cache.paths] != files.paths or form == "tar"


@pytest.mark.parametrize("form", [TAR, COLUMNS, *SLOW])
def test_a_build_that_was_stopped_goes_on_from_any_form(form, home, tmp_path):
    options = {"batch_size": 8}
    whole = rows(build(SmallTeacher(), opened(home, "files"), tmp_path / "w", **options).folder)
    for limit in (2, 7):
        folder = tmp_path / f"cut-{limit}"
        with pytest.raises(KeyboardInterrupt):
            build(SmallTeacher(limit=limit), opened(home, form), folder, **options)
        build(SmallTeacher(), opened(home, form), folder, **options)
        assert rows(folder) == whole
    # what was begun from one form is finished from another, and then only checked
    build(SmallTeacher(limit=0), opened(home, "files"), folder, **options)
    assert rows(folder) == whole


@pytest.mark.parametrize("form", [TAR, COLUMNS, *SLOW])
def test_a_student_sees_the_same_pixels(form, home, tmp_path):
    size = Preprocess(size=(16, 16))
    stores = []
    for source in ("files", form):
        cache = build(None, opened(home, source), tmp_path / source)
        store = pixels(cache, cache.split("train"), size)
        stores.append(store.take(range(len(store))))
    assert (stores[0] == stores[1]).all()


@pytest.mark.parametrize("form", [TAR, COLUMNS, *SLOW])
def test_an_archive_that_moved_only_moves(form, home, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copy(home / f"pairs.{form}", tmp_path / "here")
    cache = build(SmallTeacher(), opened(tmp_path / "here", form), tmp_path / "cache")
    (tmp_path / "here" / f"pairs.{form}").rename(tmp_path / "there" / f"pairs.{form}")
    with pytest.raises(DataError, match="not where the cache .* found it"):
        pixels(cache, cache.split("val"), Preprocess(size=(16, 16)))
    there = opened(tmp_path / "there", form)
    moved = build(SmallTeacher(limit=0), there, tmp_path / "cache")
    assert len(pixels(moved, moved.split("val"), Preprocess(size=(16, 16)))) == 6
