"""Caches of photos without captions and of texts without photos, through the command line."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crosstill import cache, data, evaluate, students
from crosstill.cache import Cache
from crosstill.data import scenes as scenery
from crosstill.errors import MismatchError
from support import SmallTeacher, small_config
from verbs import crosstill, refusal

COUNT = 60


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Sixty scenes: a third has captions, train and val and test; the others have none."""
    listing = scenery.write(tmp_path_factory.mktemp("mixed") / "photos", COUNT)
    record = json.loads(listing.read_text())
    for number, item in enumerate(record["images"]):
        item["split"] = ("train", "train", "val", "test")[number // 3 % 4]
        if number % 3:
            item["sentences"] = []
    listing.write_text(json.dumps(record))
    return listing


@pytest.fixture(scope="module")
def lines(photos) -> Path:
    """A thousand sentences; one of them is a caption, and one stands twice."""
    caption = next(e.captions[0] for e in data.open(photos).examples if e.captions)
    path = photos.parent / "lines.txt"
    texts = [f"a red circle number {number}" for number in range(1000)]
    path.write_text("\n".join([*texts, "", caption, texts[3]]) + "\n")
    return path


@pytest.fixture(scope="module")
def teacher(photos) -> Path:
    texts = [text for example in data.open(photos).examples for text in example.captions]
    place = photos.parent / "teacher"
    students.build(small_config(), dim=16, captions=texts).save(place)
    return place


@pytest.fixture(scope="module")
def mixed(photos, lines, teacher) -> Path:
    out = photos.parent / "cache"
    crosstill("cache", teacher, photos, "--texts", lines, "--out", out)
    return out


def test_rows_are_captions_and_then_loose_texts(mixed, photos, lines, teacher):
    opened = cache.open(mixed)
    assert isinstance(opened, Cache)
    table = pq.read_table(mixed / "texts.parquet").to_pydict()
    captions = [c for e in data.open(photos).examples for c in e.captions]
    assert table.keys() == {"text", "split"}
    assert sorted(table["text"]) == sorted({*lines.read_text().split("\n")} - {"", *captions})
    assert opened.loose == len(table["text"]) == 1000
    assert sorted(opened.texts[:-1000]) == sorted(captions)
    assert opened.texts[-1000:] == table["text"]
    assert (opened.owner[:-1000] >= 0).all() and (opened.owner[-1000:] == -1).all()
    model = students.load(teacher)
    rows = np.random.default_rng(0).permutation(len(opened.texts))[:50]
    expected = model.embed_texts([opened.texts[row] for row in rows])
    torch.testing.assert_close(opened.text_features(rows), expected, atol=2e-3, rtol=0)
    assert opened.header["rows"] == {"image": COUNT, "text": len(opened.texts)}


def test_a_split_has_its_loose_texts_last(mixed):
    opened = cache.open(mixed)
    table = pq.read_table(mixed / "texts.parquet").to_pydict()
    for name in ("train", "val", "test"):
        split = opened.split(name)
        loose = [text for text, s in zip(table["text"], table["split"], strict=True) if s == name]
        assert len(split.images) == (opened.splits == name).sum() == 3 * len(split.captioned)
        assert split.pairs == 5 * len(split.captioned) > 0
        owned, rest = split.captions[: split.pairs], split.captions[split.pairs :]
        assert (split.images[split.owner[: split.pairs]] == opened.owner[owned]).all()
        assert (split.owner[split.pairs :] == -1).all() and len(rest) > 0
        assert [opened.texts[row] for row in rest] == loose
        assert opened.captions(name)[split.pairs :] == loose
        pairs = opened.pairs(name)
        assert len(pairs) == len(split.images)
        assert sum(len(e.captions) for e in pairs.examples) == split.pairs
        paired = split.paired()
        assert (paired.images == split.images[split.captioned]).all()
        assert (paired.images[paired.owner] == opened.owner[paired.captions]).all()
        assert paired.paired() is paired


def test_recall_is_of_the_pairs_alone(mixed, photos, teacher):
    """The teacher's recall from the cache is that of its photos that have captions."""
    opened, model = cache.open(mixed), students.load(teacher)
    split = opened.split("val")
    listed = evaluate.retrieval(model, data.open(photos).split("val")).recall
    for recall in (
        evaluate.teacher_recall(opened, split),
        evaluate.CachedSplit(opened, split, model).recall(model),
    ):
        assert recall is not None
        assert (recall.images, recall.captions) == (listed.images, listed.captions)
        assert recall.rsum == pytest.approx(listed.rsum, abs=5)
    answers = evaluate.CachedSplit(opened, split, model).answers(model)
    assert len(answers.text) == split.pairs and len(answers.image) == len(split.captioned)


def test_what_there_was_is_counted(photos, lines, teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    done = crosstill("cache", teacher, photos, "--texts", lines, "--out", tmp_path / "c")
    assert "photos without captions: 40" in done.stderr
    assert "lines: 1,003, of which 1 empty, 1 repeated, 1 captions already" in caplog.text
    assert "60 images" in done.stdout
    assert "40 of them without captions, 100 captions and 1,000 loose texts" in done.stdout
    assert crosstill("cache", "verify", tmp_path / "c").stdout == done.stdout


def test_neither_the_order_of_lines_nor_of_files_matters(mixed, photos, lines, teacher, tmp_path):
    texts = lines.read_text().split("\n")
    random.Random(1).shuffle(texts)
    for number in range(2):
        (tmp_path / f"{number}.txt").write_bytes("\r\n".join(texts[number::2]).encode())
    files = [tmp_path / "1.txt", tmp_path / "0.txt"]
    words = [word for file in files for word in ("--texts", file)]
    crosstill("cache", teacher, photos, *words, "--out", tmp_path / "c")
    assert cache.open(tmp_path / "c").digest == cache.open(mixed).digest
    for name in ("texts.parquet", "text-00000.npy", "captions.parquet"):
        assert (tmp_path / "c" / name).read_bytes() == (mixed / name).read_bytes()


def test_other_texts_are_another_cache(mixed, photos, lines, teacher, tmp_path):
    (tmp_path / "few.txt").write_text("a dog\n")
    for words in ((), ("--texts", tmp_path / "few.txt")):
        line = refusal("cache", teacher, photos, *words, "--out", mixed)
        assert "a feature cache of another set of loose texts; give another --out" in line
    crosstill("cache", teacher, photos, "--out", tmp_path / "bare")
    assert "texts" not in cache.open(tmp_path / "bare").header["key"]
    line = refusal("cache", teacher, photos, "--texts", lines, "--out", tmp_path / "bare")
    assert "another set of loose texts" in line


def test_photos_that_moved_keep_the_texts(mixed, photos, lines, teacher, tmp_path):
    moved = shutil.copytree(photos.parent, tmp_path / "moved", ignore=lambda *_: ["cache"])
    place = shutil.copytree(mixed, tmp_path / "cache")
    crosstill("cache", teacher, moved / photos.name, "--texts", lines, "--out", place)
    opened = cache.open(place)
    assert opened.loose == 1000 and opened.digest == cache.open(mixed).digest
    assert opened.photo(0)


def test_texts_need_a_teacher_that_reads_them(photos, lines, tmp_path):
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    names = [Path(example.path).name for example in data.open(photos).examples]
    (vectors / "filenames.txt").write_text("\n".join(names))
    np.save(vectors / "image.npy", np.random.default_rng(0).normal(size=(COUNT, 8)))
    line = refusal("cache", vectors, photos, "--texts", lines, "--out", tmp_path / "c")
    assert "--texts: vectors has no text features" in line
    line = refusal("cache", "none", photos, "--texts", lines, "--out", tmp_path / "c")
    assert "--texts: there is no teacher" in line


def test_vectors_of_texts_are_found_by_the_text(photos, lines, tmp_path):
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    pairs, random_rows = data.open(photos), np.random.default_rng(0)
    texts = sorted(
        {c for e in pairs.examples for c in e.captions} | {*lines.read_text().split("\n")}
    )
    texts = [text for text in texts if text]
    (vectors / "filenames.txt").write_text("\n".join(Path(e.path).name for e in pairs.examples))
    (vectors / "captions.txt").write_text("\n".join(texts))
    np.save(vectors / "image.npy", random_rows.normal(size=(COUNT, 8)))
    rows = random_rows.normal(size=(len(texts), 8))
    np.save(vectors / "text.npy", rows)
    crosstill("cache", vectors, photos, "--texts", lines, "--out", tmp_path / "c")
    opened = cache.open(tmp_path / "c")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.stack([unit[texts.index(text)] for text in opened.texts])
    found = opened.text_features(np.arange(len(opened.texts))).numpy()
    assert abs(found - expected).max() < 1e-3
    more = tmp_path / "more.txt"
    more.write_text("one that has no vector\nanother without\n")
    line = refusal(
        *("cache", vectors, photos, "--texts", lines, "--texts", more, "--out", tmp_path / "d")
    )
    assert "--texts: no vector of 2 of 1,002 texts in" in line


def test_without_a_teacher_photos_without_captions_are_left_out(photos, tmp_path, caplog):
    caplog.set_level("INFO")
    crosstill("cache", "none", photos, "--out", tmp_path / "c")
    assert "40 photos without captions left out" in caplog.text
    assert len(cache.open(tmp_path / "c").image_ids) == 20


def test_photos_alone_are_a_cache_of_a_teacher_and_of_no_one_else(photos, lines, teacher, tmp_path):
    """A folder of photos and nothing else, with or without texts that belong to none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos.parent.glob("*.png"):
        shutil.copy(path, folder)
    crosstill("cache", teacher, folder, "--out", tmp_path / "c")
    opened = cache.open(tmp_path / "c")
    assert (len(opened.image_ids), opened.texts, opened.loose) == (COUNT, [], 0)
    crosstill("cache", teacher, folder, "--texts", lines, "--out", tmp_path / "d")
    opened = cache.open(tmp_path / "d")
    assert (opened.loose, opened.split("val").pairs) == (1001, 0)
    line = refusal("cache", "none", folder, "--out", tmp_path / "e")
    assert "no captions in it" in line


def test_only_what_serves_pairs_is_measured(photos, teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    crosstill("evaluate", teacher, photos, "--split", "val")
    assert "10 photos without captions left out" in caplog.text
    folder = tmp_path / "photos/val"
    folder.mkdir(parents=True)
    for path in photos.parent.glob("*.png"):
        shutil.copy(path, folder)
    line = refusal("evaluate", teacher, folder.parent, "--split", "val")
    assert "no captions in it, and they are needed here" in line


def test_a_cache_of_before_goes_on_without_photos_that_have_no_captions(photos, tmp_path, caplog):
    """They were set apart when its dataset was read, so that they are not in its key."""
    pairs = data.open(photos)
    old = cache.build(SmallTeacher(), pairs.captioned(), tmp_path / "old")
    with pytest.raises(KeyboardInterrupt):
        cache.build(SmallTeacher(limit=0), pairs.captioned(), tmp_path / "cut")
    caplog.set_level("INFO")
    for name in ("old", "cut"):
        caplog.clear()
        again = cache.build(SmallTeacher(), pairs, tmp_path / name)
        assert again.digest == old.digest and len(again.image_ids) == 20
        assert "40 photos without captions left out" in caplog.text
    assert cache.build(SmallTeacher(), pairs, tmp_path / "new").digest != old.digest


def test_texts_as_python_has_them(photos, lines, tmp_path):
    pairs = data.open(photos)
    made = [
        cache.build(SmallTeacher(), pairs, tmp_path / str(number), texts=texts)
        for number, texts in enumerate(([lines], lines.read_text().split("\n")))
    ]
    assert made[0].digest == made[1].digest and made[0].loose == 1000


def test_joined_caches_have_the_same_texts(mixed, photos, lines, teacher, tmp_path):
    cache.build(SmallTeacher(), data.open(photos), tmp_path / "b", texts=[lines])
    crosstill("join", mixed, tmp_path / "b", "--out", tmp_path / "ab")
    joined, first = cache.open(tmp_path / "ab"), cache.open(mixed)
    assert isinstance(joined, Cache)
    assert joined.texts == first.texts and (joined.owner == first.owner).all()
    assert joined.text_features(np.arange(len(joined.texts))).shape == (len(first.texts), 32)
    cache.build(SmallTeacher(), data.open(photos), tmp_path / "c")
    with pytest.raises(MismatchError, match=r"other loose texts than .* \(0 and 1,000\)"):
        cache.join([mixed, tmp_path / "c"], tmp_path / "ac")
