import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes import DIM, FakeEncoder, bundle, photo, put, row, sha

from crosstill.errors import (
    ConfigError,
    CorruptError,
    CrosstillError,
    DataError,
    ImageError,
    MismatchError,
    ModelError,
)
from crosstill.search import index_builder, index_folder, scan, searcher
from crosstill.search.index_builder import build
from crosstill.search.memory_vectors import MemoryVectors
from crosstill.search.searcher import MAX_TOP, Searcher, combine
from support import wait_for

SEEDS = range(60)


@pytest.fixture(autouse=True)
def fake(request, monkeypatch):
    if "index_folder" not in request.fixturenames:
        monkeypatch.setattr(index_builder, "Encoder", FakeEncoder)
        monkeypatch.setattr(searcher, "Encoder", FakeEncoder)


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a bundle, sixty photos and their index."""
    put(tmp_path / "photos", **{f"n{seed}": seed for seed in SEEDS})
    build(bundle(tmp_path / "bundle"), tmp_path / "photos", tmp_path / "index")
    return tmp_path


@pytest.fixture
def opened(place) -> Searcher:
    return Searcher.open(place / "index")


def again(place: Path, **seeds: int) -> None:
    put(place / "photos", **seeds)
    build(place / "bundle", place / "photos", place / "index")


# --- finding ---


def test_hits_are_the_nearest_photos_in_order(opened):
    queries = np.stack([row(seed) for seed in (3, 1000, 1001)])
    exact = queries @ np.stack([row(seed) for seed in SEEDS]).T
    for hits, scores in zip(opened.find(queries, 7), exact, strict=True):
        order = np.argsort(-scores)[:7]
        assert [hit.id for hit in hits] == [sha(SEEDS[n]) for n in order]
        assert [hit.path for hit in hits] == [f"n{SEEDS[n]}.ppm" for n in order]
        np.testing.assert_allclose([hit.score for hit in hits], scores[order], atol=1e-6)


def test_more_than_there_are_gives_all(opened):
    assert len(opened) == 60
    assert len(opened.find(row(0)[None], MAX_TOP)[0]) == 60
    assert opened.find(np.empty((0, DIM), np.float32), 5) == []


def test_a_threshold_leaves_out_what_scores_less(opened):
    every = opened.find(row(3)[None], 60)[0]
    some = opened.find(row(3)[None], 60, every[4].score)[0]
    assert some == every[:5]
    assert opened.find(row(1000)[None], 60, 0.999) == [[]]


@pytest.mark.parametrize("top", [0, -1, MAX_TOP + 1])
def test_a_top_out_of_range_is_refused(opened, top):
    with pytest.raises(ConfigError, match=f"top {top}: give a number from 1 to 1000"):
        opened.find(row(0)[None], top)


@pytest.mark.parametrize("shape", [(DIM,), (1, DIM + 1), (1, 1, DIM)])
def test_queries_of_another_shape_are_refused(opened, shape):
    with pytest.raises(CrosstillError, match="queries of shape"):
        opened.find(np.zeros(shape, np.float32), 1)


def test_queries_that_are_not_finite_are_refused(opened):
    with pytest.raises(CrosstillError, match="not finite"):
        opened.find(np.full((1, DIM), np.nan, np.float32), 1)


def test_photos_are_known_by_their_id_alone(opened, place):
    found = opened.photo(sha(3))
    assert found.path == place / "photos/n3.ppm" and found.relative == "n3.ppm"
    assert found.path.read_bytes() == photo(3) and found.size == len(photo(3))
    assert found.mtime_ns == found.path.stat().st_mtime_ns
    np.testing.assert_allclose(opened.vector(sha(3)), row(3), atol=1e-6)
    wrong = ["", "0", sha(999), sha(3).upper(), sha(3)[:-1], sha(3) + "0", sha(3) + "\n"]
    for other in (*wrong, "../../etc/passwd", "x" * 64, "é" * 64, "%"):
        assert opened.photo(other) is None and opened.vector(other) is None


def test_an_image_becomes_its_vector(opened):
    np.testing.assert_allclose(opened.encode_image(photo(3), "n3.ppm"), row(3), atol=1e-6)
    with pytest.raises(ImageError, match="upload: SVG is not read"):
        opened.encode_image(b"<svg/>", "upload")


def test_text_and_photo_together(opened):
    both = combine(row(3), row(4))
    assert both.dtype == np.float32 and np.linalg.norm(both) == pytest.approx(1)
    np.testing.assert_allclose(both @ row(3), both @ row(4), atol=1e-6)
    assert {hit.id for hit in opened.find(both[None], 2)[0]} == {sha(3), sha(4)}
    np.testing.assert_allclose(combine(row(3)), row(3), atol=1e-6)
    with pytest.raises(ConfigError, match="cancel each other out"):
        combine(row(3), -row(3))


# --- the threshold ---


def calibrated(place: Path, captions, photos=SEEDS) -> Searcher:
    shutil.rmtree(place / "index", ignore_errors=True)
    shutil.rmtree(place / "photos", ignore_errors=True)
    put(place / "photos", **{f"n{seed}": seed for seed in photos})
    name = place / f"bundle-{len(list(place.iterdir()))}"
    build(bundle(name, captions=captions), place / "photos", place / "index")
    return Searcher.open(place / "index")


def test_the_threshold_is_what_captions_of_other_images_reach(tmp_path):
    """A caption's vector is that of its photo, which is left out where the index holds it."""
    captions = range(30, 130)
    opened = calibrated(tmp_path, captions)
    scores = np.stack([row(c) for c in captions]) @ np.stack([row(s) for s in SEEDS]).T
    scores[np.arange(30), np.arange(30, 60)] = -1  # photos 30 to 59 are in the index
    best = scores.max(axis=1)
    for rate in (0.05, 0.01, 0.5):
        assert opened.threshold(rate) == pytest.approx(np.quantile(best, 1 - rate), abs=1e-3)
        assert (best >= opened.threshold(rate)).mean() == pytest.approx(rate, abs=0.011)
    assert opened.threshold() == opened.threshold(0.5) < opened.threshold(0.05) < 0.9


def test_the_threshold_follows_the_index(tmp_path):
    few = calibrated(tmp_path, range(100, 200), range(10)).threshold()
    assert calibrated(tmp_path, range(100, 200), range(90)).threshold() > few


def test_many_captions_are_thinned_and_a_graph_is_asked_like_a_table(monkeypatch):
    rows = np.stack([row(seed) for seed in range(300)])
    held = {kind: MemoryVectors(DIM, kind) for kind in ("flat", "hnsw")}
    for index in held.values():
        index.add(np.arange(300), rows)
    captions = np.stack([row(seed) for seed in range(5000, 7000)])
    asked = []
    monkeypatch.setattr(searcher, "calibration", lambda _: (captions, [sha(0)] * 2000))
    for kind, index in held.items():
        search = index.search
        monkeypatch.setattr(index, "search", lambda q, k, s=search: asked.append(len(q)) or s(q, k))
        held[kind] = searcher.quantile_score(searcher.calibrate(None, index, {}), 0.05)
    assert asked == [1000, 1000]
    assert held["flat"] == pytest.approx(held["hnsw"], abs=0.01)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2, float("nan")])
def test_a_rate_that_is_no_share_is_refused(tmp_path, rate):
    with pytest.raises(ConfigError, match="give a share between 0 and 1"):
        calibrated(tmp_path, [100, 101]).threshold(rate)


@pytest.mark.parametrize(("captions", "photos"), [(None, [1, 2]), ([1], [1])])
def test_an_index_that_cannot_be_calibrated_says_so(tmp_path, captions, photos):
    with pytest.raises(ConfigError, match="no calibrated threshold.*give a score"):
        calibrated(tmp_path, captions, photos).threshold()


# --- what changes below an open index ---


def test_a_new_generation_is_taken_up_when_asked(place, opened):
    assert opened.refresh() is False
    again(place, new=100)
    assert len(opened) == 60 and opened.photo(sha(100)) is None
    assert opened.refresh() is True and opened.refresh() is False
    assert len(opened) == 61 and opened.generation == 2
    assert opened.find(row(100)[None], 1)[0][0].path == "new.ppm"


def test_an_index_made_from_nothing_under_the_same_number_is_noticed(place, opened):
    shutil.rmtree(place / "index")
    again(place, new=100)
    assert opened.generation == 1 and opened.refresh() is True
    assert len(opened) == 61


def test_an_open_index_outlives_its_files(place, opened):
    for seed in (100, 101, 102):
        again(place, new=seed)
    assert not (place / "index/g-000001").exists()
    assert opened.find(row(3)[None], 1)[0][0].id == sha(3)
    assert opened.photo(sha(4)).relative == "n4.ppm"
    np.testing.assert_allclose(opened.vector(sha(5)), row(5), atol=1e-6)


def test_a_damaged_or_foreign_index_is_not_taken_up(place, opened, caplog):
    pointer = place / "index/index.json"
    whole = pointer.read_bytes()
    pointer.write_bytes(b"{}")
    for _ in range(3):
        assert opened.refresh() is False
    assert len(caplog.messages) == 1 and "still serving generation 1" in caplog.messages[0]
    pointer.write_bytes(whole)
    assert opened.refresh() is False
    other = bundle(place / "other", "second")
    build(other, place / "photos", place / "index", rebuild=True)
    assert opened.refresh() is False and "start again to take it up" in caplog.text
    assert opened.find(row(3)[None], 1)[0][0].id == sha(3)


def test_queries_run_on_while_generations_change(place, opened):
    stop, wrong, answered = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            hits = opened.find(row(3)[None], 3)[0]
            if hits[0].id != sha(3) or len(hits) != 3 or opened.photo(sha(3)) is None:
                wrong.append(hits)
            answered.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(100, 106):
            before = len(answered)
            again(place, new=seed)
            assert opened.refresh()
            wait_for(lambda before=before: len(answered) > before + 4)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_index_that_switches_while_it_is_opened(place, monkeypatch):
    """Twice, so that the generation that the pointer named is deleted under the reader."""
    real, seeds = index_folder.check_generation, iter((100, 101))

    def slow(index, pointer):
        monkeypatch.setattr(index_folder, "check_generation", real)
        for seed in seeds:
            again(place, new=seed)
        return real(index, pointer)

    monkeypatch.setattr(index_folder, "check_generation", slow)
    opened = Searcher.open(place / "index")
    assert opened.generation == 3 and opened.photo(sha(101)) is not None


# --- what is refused ---


def test_what_is_no_index_is_refused(tmp_path, place):
    for where, match in (
        (tmp_path / "nowhere", "nowhere: no such index; make one with"),
        (place / "photos", "photos: no index; make one with"),
        (place / "photos/n3.ppm", r"n3\.ppm: no such index"),
    ):
        with pytest.raises(DataError, match=match):
            Searcher.open(where)


def test_an_index_that_has_published_nothing_says_that_it_was_begun(place, monkeypatch):
    shutil.rmtree(place / "index")
    monkeypatch.setattr(scan, "walk", None)
    with pytest.raises(TypeError):
        again(place)
    with pytest.raises(DataError, match="was begun, but none of its photos is published yet"):
        Searcher.open(place / "index")


def test_another_bundle_is_refused_and_the_same_elsewhere_is_not(place):
    other = bundle(place / "other", "second")
    with pytest.raises(
        MismatchError, match="not made with the bundle .*other: not the same weights"
    ):
        Searcher.open(place / "index", other)
    assert len(Searcher.open(place / "index", place / "bundle")) == 60
    (other / "text.onnx").unlink()
    with pytest.raises(ModelError, match=r"half a bundle, text\.onnx is missing"):
        Searcher.open(place / "index", other)


def test_an_index_of_a_newer_version_is_refused(place):
    from crosstill import files

    pointer = place / "index/index.json"
    newer = files.read_json(pointer) | {"format": 99}
    files.write_json(pointer, files.sealed(newer))
    with pytest.raises(CorruptError, match="format 99 is unknown here"):
        Searcher.open(place / "index")


# --- a real student ---


def test_words_and_photos_find_what_the_encoder_says(index_folder, photos, encoder):
    opened = Searcher.open(index_folder)
    names = sorted(os.listdir(photos))
    pixels = np.stack([encoder.load((photos / n).read_bytes(), n) for n in names])
    rows, texts = encoder.encode_images(pixels), ["a red circle", "two squares", ""]
    exact = encoder.encode_texts(texts) @ rows.T
    for hits, scores in zip(opened.find(opened.encode_texts(texts), 40), exact, strict=True):
        found = {hit.path: hit.score for hit in hits}
        assert sorted(found) == names
        np.testing.assert_allclose([found[name] for name in names], scores, atol=1e-5)
    data = (photos / names[7]).read_bytes()
    assert opened.find(opened.encode_image(data, names[7])[None], 1)[0][0].path == names[7]
    opened.warm()
    assert -1 < opened.threshold() < 1
    opened.close()
