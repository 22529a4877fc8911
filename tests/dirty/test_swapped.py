"""Photos swapped after they were hashed and before they are read: no row gets another's id."""

import io
import json
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mutants import encoded, picture

from crosstill import cache, images, students
from support import small_config
from verbs import crosstill

COUNT, SWAPPED = 12, 5
# of one size and the same length, so that a swap moves nothing in an archive
PHOTOS = [encoded(picture(seed), "BMP") for seed in range(COUNT)]
LATER = PHOTOS[1:SWAPPED] + PHOTOS[:1] + PHOTOS[SWAPPED:]


def as_folder(home: Path, photos: list[bytes]) -> Path:
    folder = home / "folder"
    folder.mkdir(exist_ok=True)
    for number, photo in enumerate(photos):
        (folder / f"{number:02}.bmp").write_bytes(photo)
        (folder / f"{number:02}.txt").write_text(f"photo {number}")
    return folder


def as_tar(home: Path, photos: list[bytes]) -> Path:
    with tarfile.open(home / "all.tar", "w") as archive:
        for number, photo in enumerate(photos):
            for suffix, content in ((".bmp", photo), (".txt", b"photo %d" % number)):
                info = tarfile.TarInfo(f"{number:02}{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return home / "all.tar"


def as_parquet(home: Path, photos: list[bytes]) -> Path:
    rows = [{"image": photo, "caption": f"photo {n}"} for n, photo in enumerate(photos)]
    pq.write_table(pa.Table.from_pylist(rows), home / "all.parquet")
    return home / "all.parquet"


def as_plain_parquet(home: Path, photos: list[bytes]) -> Path:
    rows = [{"image": photo, "caption": f"photo {n}"} for n, photo in enumerate(photos)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, home / "plain.parquet", compression="none", use_dictionary=False)
    return home / "plain.parquet"


FORMS = [as_folder, as_tar, as_parquet, as_plain_parquet]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A student's folder, which serves as a teacher."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "student"
    captions = [f"photo {number}" for number in range(COUNT)]
    students.build(small_config(0.0), dim=16, captions=captions).save(folder)
    return folder


@pytest.fixture
def swap(monkeypatch):
    """Arrange for other photos to lie there once the model is loaded: hashing is over by then."""

    def arrange(lay, home: Path) -> None:
        load = students.load

        def loading(*arguments):
            lay(home, LATER)
            return load(*arguments)

        monkeypatch.setattr(students, "load", loading)

    return arrange


@pytest.mark.parametrize("lay", FORMS)
def test_no_row_of_a_cache_belongs_to_another_photo(lay, model, swap, tmp_path):
    source = lay(tmp_path, PHOTOS)
    swap(lay, tmp_path)
    done = crosstill("cache", model, source, "--out", tmp_path / "cache", "--dtype", "fp32")
    made, teacher = cache.Cache(tmp_path / "cache"), students.load(model)
    content = {sha256(photo).hexdigest(): photo for photo in PHOTOS}
    for row, key in enumerate(made.image_ids):
        seen = images.load(content[key], "", teacher.preprocess)
        wanted = teacher.embed_images(seen[None])
        torch.testing.assert_close(made.image_features(np.array([row])), wanted)
    rows = (tmp_path / "cache/quarantine.jsonl").read_text().splitlines()
    said = [(row["class"], row["reason"]) for row in map(json.loads, rows)]
    assert said == [("changed", "changed since it was listed")] * SWAPPED
    assert len(made.image_ids) == COUNT - SWAPPED
    assert f"unreadable images left out: {SWAPPED}, listed in" in done.stderr


@pytest.mark.parametrize("lay", FORMS)
def test_strict_stops_at_a_photo_that_was_swapped(lay, model, swap, tmp_path):
    source = lay(tmp_path, PHOTOS)
    swap(lay, tmp_path)
    done = crosstill("cache", model, source, "--out", tmp_path / "cache", "--strict", code=2)
    assert done.stderr.splitlines()[-1].endswith(": changed since it was listed")


def test_no_figure_is_of_another_photo(model, swap, tmp_path):
    source = as_folder(tmp_path, PHOTOS)
    every = ["evaluate", model, source, "--split", "train", "--json"]
    before = json.loads(crosstill(*every).stdout)
    swap(as_folder, tmp_path)
    after = json.loads(crosstill(*every).stdout)
    assert before["images"] - after["images"] > 0, (before, after)
