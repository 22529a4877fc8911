import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosstill import data, images, teachers
from crosstill.cache import Cache, build
from crosstill.data import scenes as scenery
from crosstill.errors import (
    ConfigError,
    CorruptError,
    DataError,
    ImageError,
    InputError,
    LockedError,
    MismatchError,
    ModelError,
)
from crosstill.files import locked
from crosstill.types import Example, image_id
from support import SmallTeacher, cut, flip, matrix

ROWS = 16  # in a shard, so that sixty scenes make several


@pytest.fixture
def short_shards(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["crosstill.cache.cache_builder"], "SHARD_ROWS", ROWS)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != ".lock"
    }


def test_every_row_is_what_the_teacher_says_of_that_image_and_caption(
    scenes, teacher, tmp_path, short_shards
):
    # a shuffled dataset with a tenth missing: rows must follow ids, never places
    some = replace(scenes, examples=scenes.examples[::-1][:54])
    cache = build(teacher, some, tmp_path / "c", dtype="fp32")
    by_id = {example.image_id: example for example in some.examples}
    assert len(cache.image_ids) == 54
    for row, key in enumerate(cache.image_ids):
        pixels = images.load(some.read(by_id[key]), "", teacher.preprocess)
        expected = teacher.embed_images(pixels[None])
        torch.testing.assert_close(cache.image_features(np.array([row])), expected)
        captions = np.flatnonzero(cache.owner == row)
        texts = [cache.texts[c] for c in captions]
        assert sorted(texts) == sorted(by_id[key].captions)
        torch.testing.assert_close(cache.text_features(captions), teacher.embed_texts(texts))


def test_a_split_points_from_captions_to_their_images(cached):
    split = cached.split("val")
    assert (cached.splits[split.images] == "val").all()
    assert (split.images[split.owner] == cached.owner[split.captions]).all()


def test_half_precision_keeps_three_digits(cached, teacher, scenes):
    row = cached.image_features(np.arange(5))
    torch.testing.assert_close(row.norm(dim=1), torch.ones(5), atol=1e-3, rtol=0)


def test_views_are_replayed_from_their_seed(scenes, teacher, tmp_path):
    cache = build(teacher, scenes, tmp_path / "c", views=3, dtype="fp32")
    example = next(e for e in scenes.examples if e.image_id == cache.image_ids[7])
    for view in range(3):
        seen = images.draw_view(example.image_id, view, seed=0)
        pixels = images.load(scenes.read(example), "", teacher.preprocess, seen)
        expected = teacher.embed_images(pixels[None])
        torch.testing.assert_close(cache.image_features(np.array([7]), view), expected)


@pytest.mark.parametrize("limit", matrix(range(0, 24, 3), [9]))
def test_a_build_that_was_stopped_ends_with_the_same_bytes(scenes, tmp_path, limit, short_shards):
    options = {"batch_size": 16}
    whole = contents(build(SmallTeacher(), scenes, tmp_path / "whole", **options).folder)
    with pytest.raises(KeyboardInterrupt):
        build(SmallTeacher(limit=limit), scenes, tmp_path / "cut", **options)
    shuffled = replace(scenes, examples=scenes.examples[::-1])
    again = SmallTeacher()
    build(again, shuffled, tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == whole


def test_finished_work_is_not_done_again(scenes, tmp_path):
    build(SmallTeacher(), scenes, tmp_path / "c")
    build(SmallTeacher(limit=0), scenes, tmp_path / "c")  # would die at its first batch


def test_a_damaged_shard_of_an_unfinished_build_is_computed_again(
    scenes, tmp_path, short_shards, caplog
):
    whole = contents(build(SmallTeacher(), scenes, tmp_path / "whole", batch_size=16).folder)
    with pytest.raises(KeyboardInterrupt):
        build(SmallTeacher(limit=3), scenes, tmp_path / "cut", batch_size=16)
    damaged = tmp_path / "cut" / "image-00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    build(SmallTeacher(), scenes, tmp_path / "cut", batch_size=16)
    assert "image-00001.npy" in caplog.text
    assert contents(tmp_path / "cut") == whole


def other_preprocess() -> SmallTeacher:
    teacher = SmallTeacher()
    teacher.preprocess = images.Preprocess(size=(8, 9))
    return teacher


class Renamed(SmallTeacher):
    """The same features under another identity in one part."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def identity(self) -> dict[str, str]:
        return super().identity() | {self.part: "another"}


def other_captions(pairs):
    first, *rest = pairs.examples
    return replace(pairs, examples=(replace(first, captions=("another",)), *rest))


def other_image(pairs):
    first, *rest = pairs.examples
    return replace(pairs, examples=(replace(first, image_id="0" * 64), *rest))


def other_split(pairs):
    *rest, last = pairs.examples
    return replace(pairs, examples=(*rest, replace(last, split="train")))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": SmallTeacher(weights=1)}, "teacher.*weights"),
        ({"teacher": Renamed("tokenizer")}, "teacher.*tokenizer"),
        ({"teacher": Renamed("activation")}, "teacher.*activation"),
        ({"teacher": Renamed("family")}, "teacher.*family"),
        ({"pairs": other_split}, "dataset"),
        ({"teacher": SmallTeacher(dim=8, weights=2)}, "teacher.*weights"),
        ({"teacher": other_preprocess()}, "teacher.*preprocess"),
        ({"teacher": None}, "teacher"),
        ({"pairs": other_captions}, "dataset"),
        ({"pairs": other_image}, "dataset"),
        ({"pairs": lambda pairs: replace(pairs, examples=pairs.examples[1:])}, "dataset"),
        ({"views": 2}, "views"),
        ({"seed": 1}, "seed"),
        ({"dtype": "fp32"}, "dtype"),
    ],
)
def test_a_cache_of_anything_else_is_refused_by_name(scenes, cached, change, named):
    options = dict(change)
    teacher = options.pop("teacher") if "teacher" in options else SmallTeacher()
    pairs = options.pop("pairs", lambda same: same)(scenes)
    before = contents(cached.folder)
    with pytest.raises(MismatchError, match=f"another .*{named}"):
        build(teacher, pairs, cached.folder, **options)
    assert contents(cached.folder) == before


def touch(home: Path, record: dict) -> None:
    for path in home.iterdir():
        os.utime(path, (1, 1))


def rename_photos(home: Path, record: dict) -> None:
    for item in record["images"]:
        name = f"new {item['filename']}"
        (home / item["filename"]).rename(home / name)
        item["filename"] = name


def move_photos(home: Path, record: dict) -> None:
    (home / "deep").mkdir()
    for item in record["images"]:
        (home / item["filename"]).rename(home / "deep" / item["filename"])
        item["filepath"] = "deep"


def move_all(home: Path, record: dict) -> None:
    home.rename(home.with_name("there"))


def reorder(home: Path, record: dict) -> None:
    record["images"].reverse()
    for item in record["images"]:
        item["sentences"].reverse()


def call_otherwise(home: Path, record: dict) -> None:
    record["dataset"] = "another name"


@pytest.mark.parametrize(
    "change", [touch, rename_photos, move_photos, move_all, reorder, call_otherwise]
)
def test_the_same_photos_hit_wherever_they_lie(tmp_path, change):
    listing = scenery.write(tmp_path / "here", 20)
    record = json.loads(listing.read_text())
    build(SmallTeacher(), data.open(listing), tmp_path / "c")
    change(tmp_path / "here", record)
    home = tmp_path / ("there" if change is move_all else "here")
    (home / "dataset.json").write_text(json.dumps(record))
    moved = data.open(home / "dataset.json")
    cache = build(SmallTeacher(limit=0), moved, tmp_path / "c")  # would die at its first batch
    by_id = {example.image_id: example.path for example in moved.examples}
    for key, path in zip(cache.image_ids, cache.paths, strict=True):
        assert path == by_id[key]
        assert image_id(cache.read(Example(key, path, (), "train"))) == key


def test_a_photo_with_one_byte_changed_misses(tmp_path):
    listing = scenery.write(tmp_path / "here", 20)
    build(SmallTeacher(), data.open(listing), tmp_path / "c")
    photo = tmp_path / "here/000003.png"
    photo.write_bytes(photo.read_bytes() + b"\0")  # the same pixels
    with pytest.raises(MismatchError, match="another dataset"):
        build(SmallTeacher(), data.open(listing), tmp_path / "c")


@pytest.fixture
def spoilt(tmp_path):
    """Twenty scenes as files, two of them unreadable."""
    scenery.write(tmp_path / "photos", 20)
    files = sorted((tmp_path / "photos").glob("*.png"))
    files[3].write_bytes(files[3].read_bytes()[:200])
    files[4].write_bytes(b"no image at all")
    return data.open(tmp_path / "photos/dataset.json")


def test_bad_images_are_set_apart_and_listed(spoilt, teacher, tmp_path):
    cache = build(teacher, spoilt, tmp_path / "c")
    lines = (tmp_path / "c/quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in lines} == {"000003.png", "000004.png"}
    assert cache.header["quarantined"] == 2
    assert len(cache.image_ids) == 18
    assert len(cache.texts) == 18 * 5


def test_strict_stops_at_the_first_bad_image(spoilt, teacher, tmp_path):
    with pytest.raises(ImageError, match="00000[34]"):
        build(teacher, spoilt, tmp_path / "c", strict=True)


def test_all_images_unreadable_is_one_line(spoilt, teacher, tmp_path):
    bad = replace(spoilt, examples=tuple(spoilt.examples[3:5]))
    with pytest.raises(DataError, match="all 2 images are unreadable"):
        build(teacher, bad, tmp_path / "c")


def test_a_second_builder_is_told_who_is_first(scenes, teacher, tmp_path):
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"), pytest.raises(LockedError, match="in use by process"):
        build(teacher, scenes, tmp_path / "c")


def test_a_folder_with_other_files_is_left_alone(scenes, teacher, tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ConfigError, match="holds photo.jpg and no cache; give another --out"):
        build(teacher, scenes, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_damaged_cache_says_how_to_make_it_anew(scenes, teacher, tmp_path):
    build(teacher, scenes, tmp_path / "c")
    (tmp_path / "c/text-00000.npy").unlink()
    with pytest.raises(CorruptError, match="text-00000.*delete .* and run the same command again"):
        build(teacher, scenes, tmp_path / "c")


def test_no_teacher_keeps_captions_and_no_features(scenes, tmp_path):
    cache = build(None, scenes, tmp_path / "c")
    assert cache.dim is None
    assert len(cache.texts) == 300
    with pytest.raises(InputError, match="no image features"):
        cache.image_features(np.array([0]))


def test_wrong_options_are_config_errors(scenes, teacher, tmp_path):
    with pytest.raises(ConfigError, match="fp8"):
        build(teacher, scenes, tmp_path / "c", dtype="fp8")
    with pytest.raises(TypeError, match="vieews"):
        build(teacher, scenes, tmp_path / "c", vieews=2)


def test_a_split_without_images_names_those_that_have_some(cached):
    with pytest.raises(DataError, match=r"'trian' has no images .*test, train, val"):
        cached.split("trian")


def damaged(cached: Cache, copy: Path, count: int, damage) -> Iterator[Path]:
    """Damage a random file of a copied cache `count` times, putting it back each time."""
    random = np.random.default_rng(0)
    shutil.copytree(cached.folder, copy)
    paths = [p for p in copy.iterdir() if p.is_file() and p.name != ".lock" and p.stat().st_size]
    for _ in range(count):
        path = paths[random.integers(len(paths))]
        whole = path.read_bytes()
        put(path, damage(whole, random))
        yield path
        put(path, whole)


def put(path: Path, data: bytes) -> None:
    """In place, which is far faster than a new file."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def test_a_thousand_flipped_bits_are_found_on_opening(cached, tmp_path):
    for path in damaged(cached, tmp_path / "copy", 1000, flip):
        try:
            header = Cache(tmp_path / "copy").header
        except CorruptError as error:
            assert path.name in str(error)
        else:  # white space of the JSON header is all that may change unnoticed
            assert path.name == "cache.json" and header == cached.header


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_truncated_files_are_found_on_opening(cached, tmp_path, count):
    for path in damaged(cached, tmp_path / "copy", count, cut):
        with pytest.raises(CorruptError, match=path.name):
            Cache(tmp_path / "copy")


def test_vectors_of_both_sides_are_looked_up_by_name_and_by_text(scenes, tmp_path):
    known = SmallTeacher()
    folder = tmp_path / "vectors"
    folder.mkdir()
    random = np.random.default_rng(0)
    texts = sorted({text for example in scenes.examples for text in example.captions})
    (folder / "filenames.txt").write_text("\n".join(e.path for e in scenes.examples))
    (folder / "captions.txt").write_text("\n".join(texts))
    np.save(folder / "image.npy", random.normal(size=(len(scenes), known.dim)))
    np.save(folder / "text.npy", rows := random.normal(size=(len(texts), known.dim)))
    made = build(teachers.load(folder), scenes, tmp_path / "cache", dtype="fp32")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = [unit[texts.index(text)] for text in made.texts]
    assert np.allclose(made.text_features(np.arange(len(made.texts))), expected, atol=1e-6)
    (folder / "captions.txt").write_text("\n".join(["another", *texts[1:]]))
    with pytest.raises(ModelError, match="no vector of 1 captions"):
        build(teachers.load(folder), scenes, tmp_path / "other")
