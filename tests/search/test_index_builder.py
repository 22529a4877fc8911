import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder, bundle, photo, put, row, sha

from crosstill.errors import (
    ConfigError,
    CorruptError,
    DataError,
    DiskFullError,
    ImageError,
    InputError,
    LockedError,
    MismatchError,
    ModelError,
)
from crosstill.files import locked
from crosstill.search import (
    builder_memory,
    faiss_stores,
    index_builder,
    index_folder,
    index_writer,
    scan,
    searcher,
    vector_index,
)
from crosstill.search.index_builder import Built, build
from crosstill.search.index_folder import verify
from crosstill.search.searcher import Searcher
from support import PATIENCE, wait_for

COUNTS = ("new", "unchanged", "changed", "moved", "deleted", "unreadable", "encoded")


class Index:
    """A folder of photos, its index, and a bundle."""

    def __init__(self, place: Path) -> None:
        self.bundle, self.root, self.out = (
            bundle(place / "bundle"),
            place / "photos",
            place / "index",
        )
        self.root.mkdir()

    def put(self, **seeds: int) -> None:
        put(self.root, **seeds)

    def build(self, **options) -> Built:
        return build(self.bundle, self.root, self.out, **options)

    def counts(self, **options) -> dict[str, int]:
        """What one run did; what it did not do is left out."""
        found = self.build(**options).to_json()
        return {name: found[name] for name in COUNTS if found[name]}

    def held(self) -> dict[str, str]:
        """SHA-256 by path, as a reader sees them; every photo is found by its own vector."""
        opened = Searcher.open(self.out)
        rows = opened._opened.photos.rows()
        for one in {found.sha for found in rows.values()}:
            vector = opened.vector(one.hex())
            assert vector is not None
            assert opened.find(vector[None], 1)[0][0].id == one.hex()
        return {path: row.sha.hex() for path, row in rows.items()}

    def whole(self, **seeds: int) -> None:
        """The index holds exactly these photos, with the vectors that they should have."""
        assert self.held() == {f"{n.replace('__', '/')}.ppm": sha(s) for n, s in seeds.items()}
        opened = Searcher.open(self.out)
        for seed in seeds.values():
            np.testing.assert_allclose(opened.vector(sha(seed)), row(seed), atol=1e-6)
        assert verify(self.out).problems == []

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.out.rglob("*") if path.is_file())
        return {str(p.relative_to(self.out)): p.read_bytes() for p in found if p.name != ".lock"}

    def quarantined(self) -> dict[str, str]:
        lines = (self.out / "quarantine.jsonl").read_text().splitlines()
        return {row["path"]: row["reason"] for row in map(json.loads, lines)}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(index_builder, "Encoder", FakeEncoder)
    monkeypatch.setattr(searcher, "Encoder", FakeEncoder)
    monkeypatch.setattr(scan, "MOMENT", 0)  # what was just written is trusted nevertheless


@pytest.fixture
def index(tmp_path) -> Index:
    return Index(tmp_path)


# --- what changes in the folder ---


def test_a_first_build_and_one_with_nothing_new(index, monkeypatch):
    index.put(a=1, b=2, deep__c=3)
    assert index.counts() == {"new": 3, "encoded": 3}
    index.whole(a=1, b=2, deep__c=3)
    before = index.files()
    monkeypatch.setattr(scan, "read_photo", None)  # nothing may be read, encoded or published
    monkeypatch.setattr(index_builder, "Encoder", None)
    built = index.build()
    assert (built.generation, built.photos, built.unchanged) == (1, 3, 3)
    after = index.files()
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} <= {"work.sqlite"}


def test_new_changed_and_deleted_files(index):
    index.put(a=1, b=2, c=3)
    index.build()
    (index.root / "c.ppm").unlink()
    index.put(b=20, d=4)
    assert index.counts() == {"unchanged": 1, "changed": 1, "new": 1, "deleted": 1, "encoded": 2}
    index.whole(a=1, b=20, d=4)


def test_moved_and_copied_files_cost_no_encoding(index):
    index.put(a=1, b=2, c=3)
    index.build()
    (index.root / "deep").mkdir()
    (index.root / "a.ppm").rename(index.root / "deep/z.ppm")
    shutil.copy(index.root / "b.ppm", index.root / "b2.ppm")
    assert index.counts() == {"unchanged": 2, "moved": 1, "new": 1}
    index.whole(deep__z=1, b=2, b2=2, c=3)
    # a copy that goes leaves the photo where it was
    (index.root / "b.ppm").unlink()
    assert index.counts() == {"unchanged": 3, "deleted": 1}
    index.whole(deep__z=1, b2=2, c=3)


def test_two_photos_that_change_places(index):
    index.put(a=1, b=2)
    index.build()
    numbers = Searcher.open(index.out)._opened.photos.numbers()
    index.put(a=2, b=1)
    assert index.counts() == {"changed": 2}
    index.whole(a=2, b=1)
    assert Searcher.open(index.out)._opened.photos.numbers() == numbers


def test_the_same_bytes_twice_are_encoded_once(index):
    index.put(**{f"n{i}": i % 3 for i in range(90)})
    assert index.counts(workers=4) == {"new": 90, "encoded": 3}
    assert len(Searcher.open(index.out)) == 3


def test_a_touched_file_is_read_once_and_not_encoded(index, monkeypatch):
    index.put(a=1, b=2)
    index.build()
    os.utime(index.root / "a.ppm", ns=(5, 5))
    built = index.build()
    assert (built.unchanged, built.encoded, built.generation) == (2, 0, 2)
    assert Searcher.open(index.out).photo(sha(1)).mtime_ns == 5
    monkeypatch.setattr(scan, "read_photo", None)
    assert index.counts() == {"unchanged": 2}


def test_a_file_written_in_the_moment_it_was_read_is_read_again(index, monkeypatch):
    """The clock of a file system may not tell a write just before the reading from one after."""
    monkeypatch.undo()
    monkeypatch.setattr(index_builder, "Encoder", FakeEncoder)
    index.put(a=1)
    index.build()
    monkeypatch.setattr(scan, "read_photo", None)
    with pytest.raises(TypeError):
        index.build()


def disguise(path: Path, data: bytes) -> None:
    """Write other bytes of the same number, and set the time back."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_a_photo_replaced_by_one_of_equal_size_and_time_is_seen(index):
    index.put(a=1, b=2)
    (index.root / "b.txt").write_text("a dog")
    index.build()
    disguise(index.root / "a.ppm", photo(3))
    disguise(index.root / "b.txt", b"a cat")
    verdict = verify(index.out)
    assert (verdict.gone, verdict.changed) == (0, 1)
    why = "a.ppm: changed since it was indexed, and yet of the same size and time"
    assert verdict.outdated == [why]
    assert index.counts() == {"unchanged": 1, "changed": 1, "encoded": 1}
    index.whole(a=3, b=2)
    assert Searcher.open(index.out).photo(sha(2)).caption == "a cat"
    other = index.root.parent / "other.ppm"
    other.write_bytes(photo(4))
    shutil.copystat(index.root / "a.ppm", other)
    other.replace(index.root / "a.ppm")
    assert index.counts() == {"unchanged": 1, "changed": 1, "encoded": 1}
    assert verify(index.out).outdated == []


def test_a_folder_restored_from_a_copy_is_read_once_and_not_encoded(index, monkeypatch):
    index.put(a=1, deep__b=2)
    (index.root / "bad.jpg").write_bytes(b"no image")
    index.build()
    index.root.rename(index.root.parent / "old")
    shutil.copytree(index.root.parent / "old", index.root)
    assert verify(index.out).outdated == [], "all bytes are those that were indexed"
    built = index.build()
    assert (built.unchanged, built.encoded, built.generation) == (2, 0, 1)
    monkeypatch.setattr(scan, "read_photo", None)
    assert index.counts() == {"unchanged": 2, "unreadable": 1}


def test_a_disk_that_is_not_mounted_for_a_while_costs_no_encoding(index, caplog):
    index.put(a=1, share__b=2, share__deep__c=3, share__deep__d=4, copies__a=1, copies__a2=1)
    index.build()
    share = (index.root / "share").rename(index.root.parent / "share")
    shutil.rmtree(index.root / "copies")
    (index.root / "share").mkdir()
    (index.root / "copies").mkdir()
    verdict = verify(index.out)
    assert (verdict.gone, verdict.changed) == (5, 0)
    assert verdict.outdated == [
        f"{index.root}/copies: all 2 photos in it are gone",
        f"{index.root}/share: all 3 photos in it are gone",
    ]
    assert index.counts() == {"unchanged": 1, "deleted": 5}
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{index.root}/share: all 3 photos in it are gone; if a disk is not mounted, mount it and "
        "run the same command again: their vectors are kept for 30 days"
    ]
    assert index.counts() == {"unchanged": 1}
    assert len(caplog.records) == 1, "it is said once"
    index.whole(a=1)
    (index.root / "share").rmdir()
    share.rename(index.root / "share")
    assert index.counts() == {"unchanged": 1, "new": 3}
    index.whole(a=1, share__b=2, share__deep__c=3, share__deep__d=4)


def test_vectors_of_what_went_are_kept_for_a_while_and_not_for_ever(index, monkeypatch):
    def again(seed: int) -> int:
        index.put(b=seed)
        return index.build().encoded

    index.put(a=1, b=2)
    index.build()
    assert [again(seed) for seed in (3, 2, 3, 2)] == [1, 0, 0, 0]
    now, day = time.time_ns(), 86_400 * 10**9
    monkeypatch.setattr(builder_memory.time, "time_ns", lambda: now + 20 * day)
    assert again(3) == 0, "from now on, 2 has gone"
    monkeypatch.setattr(builder_memory.time, "time_ns", lambda: now + 49 * day)
    assert again(2) == 0
    assert again(3) == 0
    monkeypatch.setattr(builder_memory.time, "time_ns", lambda: now + 80 * day)
    index.build()
    assert again(2) == 1
    assert index.build(rebuild=True).encoded == 2
    assert again(3) == 1, "a rebuild keeps nothing"


def test_captions_come_from_text_files(index):
    index.put(a=1, b=2)
    (index.root / "a.txt").write_text("a dog\non snow\n" + "x" * 20_000)
    index.build()
    opened = Searcher.open(index.out)
    assert opened.photo(sha(1)).caption == ("a dog\non snow\n" + "x" * 20_000)[:10_000]
    assert opened.photo(sha(2)).caption == ""
    (index.root / "a.txt").unlink()
    (index.root / "b.txt").write_text("a cat")
    assert index.counts() == {"unchanged": 2}
    opened = Searcher.open(index.out)
    assert (opened.photo(sha(1)).caption, opened.photo(sha(2)).caption) == ("", "a cat")


def test_bad_files_are_left_out_and_tried_again_when_they_change(index, monkeypatch):
    index.put(a=1, b=2)
    (index.root / "bad.jpg").write_bytes(b"no image")
    (index.root / "empty.png").touch()
    (index.root / "dead.gif").symlink_to("nothing")
    assert index.counts() == {"new": 2, "unreadable": 3, "encoded": 2}
    reasons = {
        "bad.jpg": "not an image",
        "empty.png": "empty file",
        "dead.gif": "a link to nothing",
    }
    assert index.quarantined() == reasons
    with monkeypatch.context() as patch:
        patch.setattr(scan, "read_photo", None)  # they are not even read again
        assert index.counts() == {"unchanged": 2, "unreadable": 3}
    assert index.quarantined() == reasons
    (index.root / "bad.jpg").write_bytes(photo(3))
    (index.root / "empty.png").rename(index.root / "moved.png")
    assert index.counts() == {"unchanged": 2, "new": 1, "unreadable": 2, "encoded": 1}
    assert index.quarantined() == {"moved.png": "empty file", "dead.gif": "a link to nothing"}
    # and one that was good becomes bad: the index must not go on showing it
    (index.root / "a.ppm").write_bytes(b"P6 4 4 255\n")
    assert index.counts() == {"unchanged": 2, "deleted": 1, "unreadable": 3}
    assert index.held() == {"b.ppm": sha(2), "bad.jpg": sha(3)}


def test_strict_stops_at_a_bad_file_also_at_a_known_one(index):
    index.put(a=1)
    (index.root / "line\nbreak.jpg").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(ImageError, match=r"^line\\nbreak\.jpg: not an image$"):
            index.build(strict=True)
        index.build()


def test_photos_below_a_folder_that_cannot_be_listed_stay(index, monkeypatch):
    """A drive that has dropped out for a moment must not empty the index."""
    index.put(a=1, closed__b=2, closed__deep__c=3, closed2__d=4)
    index.build()
    listed = os.scandir

    def scandir(path):
        if path == index.root / "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    shutil.rmtree(index.root / "closed2")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        assert index.counts() == {"unchanged": 3, "deleted": 1, "unreadable": 1}
    assert index.quarantined() == {"closed": "Permission denied"}
    index.whole(a=1, closed__b=2, closed__deep__c=3)
    assert index.counts() == {"unchanged": 3}


def test_odd_names_come_through(index):
    names = [
        os.fsdecode(n) for n in (b"\xff\xfe", b"line\nbreak", b"n" * 251, "\u202e\u05e9".encode())
    ]
    for seed, name in enumerate(names):
        (index.root / f"{name}.ppm").write_bytes(photo(seed))
    assert index.counts() == {"new": 4, "encoded": 4}
    assert index.held() == {f"{name}.ppm": sha(seed) for seed, name in enumerate(names)}
    found = Searcher.open(index.out).photo(sha(0))
    assert found.path.read_bytes() == photo(0)
    assert index.counts() == {"unchanged": 4}


def test_a_folder_that_has_moved_is_read_but_not_encoded(index, tmp_path):
    index.put(a=1, b=2)
    index.build()
    index.root = index.root.rename(tmp_path / "elsewhere")
    # as long and as old as before, and yet another photo
    stamp = (index.root / "b.ppm").stat()
    put(index.root, b=3)
    os.utime(index.root / "b.ppm", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert index.counts() == {"unchanged": 1, "changed": 1, "encoded": 1}
    assert Searcher.open(index.out).folder == index.root


def test_a_folder_that_only_moved_is_known_to_readers(index, tmp_path):
    index.put(a=1)
    index.build()
    index.root = index.root.rename(tmp_path / "elsewhere")
    index.build()
    assert Searcher.open(index.out).photo(sha(1)).path == index.root / "a.ppm"


def test_random_changes_end_like_a_fresh_build(index, tmp_path):
    draw = random.Random(0)
    for _ in range(12):
        for _ in range(draw.randrange(1, 8)):
            path = index.root / f"{draw.randrange(3)}/{draw.randrange(12)}.ppm"
            path.parent.mkdir(exist_ok=True)
            other = draw.choice([*index.root.rglob("*.ppm"), None])
            if other and draw.random() < 0.3:
                other.rename(path)
            elif other and draw.random() < 0.3:
                other.unlink()
            else:
                path.write_bytes(photo(draw.randrange(20)))
        put(index.root, always=99)
        index.build()
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        build(index.bundle, index.root, tmp_path / "fresh")
        fresh = Searcher.open(tmp_path / "fresh")._opened.photos.rows()
        assert index.held() == {path: row.sha.hex() for path, row in fresh.items()}
    assert verify(index.out).problems == verify(index.out).outdated == []


# --- publishing ---


@pytest.fixture
def published(monkeypatch) -> list[int]:
    """How many photos each generation held."""
    counts: list[int] = []
    switch = index_folder.switch

    def note(place, pointer):
        counts.append(pointer.photos)
        switch(place, pointer)

    monkeypatch.setattr(index_folder, "switch", note)
    monkeypatch.setattr(index_builder, "FIRST", 100)
    monkeypatch.setattr(index_builder, "BATCH", 10)
    monkeypatch.setattr(index_builder, "QUEUE", 2)
    return counts


def test_a_long_build_is_published_early(index, published):
    index.put(**{f"n{i:04}": i for i in range(450)})
    index.build()
    assert published[:-1] == pytest.approx([100, 200, 400], abs=20)
    assert published[-1] == 450
    assert sorted(p.name for p in index.out.glob("g-*")) == ["g-000003", "g-000004"]
    index.whole(**{f"n{i:04}": i for i in range(450)})


def test_what_moved_is_never_missing_halfway(index, published, monkeypatch):
    index.put(**{f"n{i:04}": i for i in range(20)})
    index.build()
    for i in range(20):  # they are met last
        (index.root / f"n{i:04}.ppm").rename(index.root / f"z{i:04}.ppm")
    index.put(**{f"m{i:04}": i for i in range(1000, 1150)})
    seen = []
    switch = index_folder.switch

    def look(place, pointer):
        switch(place, pointer)
        seen.append(set(index.held().values()))

    monkeypatch.setattr(index_folder, "switch", look)
    index.build()
    assert len(seen) == 2
    assert all({sha(i) for i in range(20)} <= shas for shas in seen)
    assert len(seen[-1]) == 170


def test_a_rebuild_is_published_at_its_end_alone(index, published):
    index.put(**{f"n{i:04}": i for i in range(250)})
    index.build()
    published.clear()
    built = index.build(rebuild=True)
    assert published == [250] and built.encoded == 250
    index.whole(**{f"n{i:04}": i for i in range(250)})
    assert index.counts() == {"unchanged": 250}


def test_an_interrupted_build_goes_on_where_it_was(index, published, monkeypatch):
    index.put(**{f"n{i:04}": i for i in range(250)})
    keep = builder_memory.Memory.keep

    def interrupt(self, shas, rows):
        keep(self, shas, rows)
        if len(self.shas) >= 150:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder_memory.Memory, "keep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index.build()
    assert len(index.held()) == pytest.approx(100, abs=20)
    assert index.build().encoded == 100
    index.whole(**{f"n{i:04}": i for i in range(250)})


def test_ctrl_c_waits_for_the_batch_under_way_alone(index, published, monkeypatch):
    monkeypatch.setattr(index_builder, "QUEUE", 20)
    begun, asked, cancelled = [], [], threading.Event()

    class Watched(ThreadPoolExecutor):
        def submit(self, *work):
            asked.append(work)
            return super().submit(*work)

        def shutdown(self, **how):
            super().shutdown(**{**how, "wait": False})
            cancelled.set()
            super().shutdown()

    class Slow(FakeEncoder):
        def encode_images(self, images):
            begun.append(len(images))
            if not cancelled.is_set():
                wait_for(lambda: len(asked) == 15)  # the others are waiting by now
                os.kill(os.getpid(), signal.SIGINT)
                assert cancelled.wait(PATIENCE)
            return super().encode_images(images)

    monkeypatch.setattr(index_builder, "ThreadPoolExecutor", Watched)
    monkeypatch.setattr(index_builder, "Encoder", Slow)
    index.put(**{f"n{i:04}": i for i in range(150)})
    with pytest.raises(KeyboardInterrupt):
        index.build()
    assert len(begun) == 1
    monkeypatch.setattr(index_builder, "Encoder", FakeEncoder)
    index.build()
    index.whole(**{f"n{i:04}": i for i in range(150)})


def test_an_interrupted_rebuild_goes_on_and_the_old_index_serves(index, tmp_path, monkeypatch):
    index.put(**{f"n{i:04}": i for i in range(200)})
    index.build()
    other = bundle(tmp_path / "other", weights="second")
    keep = builder_memory.Memory.keep

    def interrupt(self, shas, rows):
        keep(self, shas, rows)
        if len(self.shas) >= 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder_memory.Memory, "keep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(other, index.root, index.out, rebuild=True)
    opened = Searcher.open(index.out)
    assert len(opened) == 200 and opened.bundle.identity["weights"] == "first"
    assert build(other, index.root, index.out, rebuild=True).encoded == pytest.approx(100, abs=32)
    assert Searcher.open(index.out).bundle.identity["weights"] == "second"
    assert opened.refresh() is False and len(opened) == 200, "the old one goes on"
    assert len(list(index.out.glob("bundle-*"))) == 1


def test_a_killed_rebuild_that_is_given_up(index, tmp_path, monkeypatch):
    index.put(a=1, b=2)
    index.build()
    other = bundle(tmp_path / "other", weights="second")
    with monkeypatch.context() as patch:
        patch.setattr(index_writer.IndexWriter, "publish", None)
        with pytest.raises(TypeError):
            build(other, index.root, index.out, rebuild=True)
    assert index.counts() == {"unchanged": 2}, "nothing is encoded anew for the old bundle"
    index.whole(a=1, b=2)


def test_the_kind_of_index_follows_the_number_of_photos(index, monkeypatch):
    stores = {"flat": "Flat", "codes": "Codes", "hnsw": "Graph"}
    monkeypatch.setattr(vector_index, "FLAT_UP_TO", 50)
    monkeypatch.setattr(vector_index, "CODES_UP_TO", 100)
    counts = {40: "flat", 90: "codes", 95: "codes", 150: "hnsw", 160: "hnsw", 80: "codes"}
    for count, kind in counts.items():
        shutil.rmtree(index.root)
        index.put(**{f"n{i}": i for i in range(count)})
        index.build()
        opened = Searcher.open(index.out)
        assert opened._opened.pointer.kind == kind
        assert type(opened._opened.vectors._store).__name__ == stores[kind]
        assert len(index.held()) == count
        assert verify(index.out).problems == []
    index.whole(**{f"n{i}": i for i in range(80)})


def test_a_large_build_says_what_it_will_take(index, monkeypatch, caplog):
    monkeypatch.setattr(index_writer, "LARGE", 3)
    index.put(a=1, b=2, c=3)
    with caplog.at_level("INFO", logger="crosstill"):
        index.build()
    assert "3 photos: the vectors will take about 648 bytes of memory" in caplog.text


def test_a_disk_that_is_too_small_is_refused_beforehand(index, monkeypatch):
    index.put(a=1)
    with monkeypatch.context() as patch:
        patch.setattr(vector_index, "estimate_bytes", lambda count, dim, kind: 10**15)
        match = r"index: No space left on device \(1,000,000\.0 GB needed, .* free\); free some"
        with pytest.raises(DiskFullError, match=match):
            index.build()


def test_a_disk_that_fills_up_while_a_generation_is_written(index, monkeypatch):
    def full(store, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    index.put(a=1)
    index.build()
    index.put(b=2)
    with monkeypatch.context() as patch:
        patch.setattr(faiss_stores.Flat, "write", full)
        with pytest.raises(DiskFullError, match=f"^{index.out}: No space left on device"):
            index.build()
    index.whole(a=1)
    assert not list(index.out.glob(".writing-*"))
    assert index.counts() == {"unchanged": 1, "new": 1}


# --- what is damaged or lost is made anew ---


def test_a_lost_memory_costs_no_encoding(index):
    index.put(**{f"n{i}": i for i in range(40)})
    index.build()
    (index.out / "work.sqlite").unlink()
    FakeEncoder.encoded = 0
    assert index.counts() == {"unchanged": 40}
    index.put(z=99)
    assert index.counts() == {"unchanged": 40, "new": 1, "encoded": 1}
    index.whole(**{f"n{i}": i for i in range(40)}, z=99)
    assert FakeEncoder.encoded == 1


def flip(path: Path, part: bytes) -> None:
    """Turn one bit of the first occurrence of some bytes in a file."""
    data = bytearray(path.read_bytes())
    place = data.index(part)
    data[place + len(part) // 2] ^= 4
    path.write_bytes(data)


ROTTEN = {
    "a vector": row(7).tobytes(),
    "a caption": b"a dog on snow",
    "a path": b"n7.ppm",
    "the hash of a content": bytes.fromhex(sha(7)),
    "the folder": b"/photos",
}


@pytest.mark.parametrize("what", ROTTEN)
def test_what_has_rotted_in_the_memory_is_noticed_and_mended(index, what, caplog):
    """The advised command, no more, mends it; nothing rotten is published meanwhile."""
    index.put(**{f"n{i}": i for i in range(40)})
    (index.root / "n7.txt").write_text("a dog on snow")
    index.build()
    flip(index.out / "work.sqlite", ROTTEN[what])
    verdict = verify(index.out)
    assert len(verdict.problems) == 1 and "work.sqlite: " in verdict.problems[0]
    assert verdict.outdated == []
    FakeEncoder.encoded = 0
    _, _, own, root, _, out = shlex.split(verdict.mend)
    build(own, root, out)
    assert "work.sqlite: " in caplog.text and "thrown away" in caplog.text
    assert FakeEncoder.encoded == 0
    index.whole(**{f"n{i}": i for i in range(40)})
    assert Searcher.open(index.out).photo(sha(7)).caption == "a dog on snow"
    assert index.counts() == {"unchanged": 40}


def test_a_rotten_vector_is_used_for_nothing(index):
    index.put(**{f"n{i}": i for i in range(40)})
    index.build()
    for path in index.out.glob("g-*/vectors.faiss"):
        path.write_bytes(b"")  # so that the memory has to be used
    flip(index.out / "work.sqlite", row(7).tobytes())
    assert index.counts() == {"new": 40, "encoded": 40}
    index.whole(**{f"n{i}": i for i in range(40)})


OLD = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, caption_size INTEGER,
    caption_mtime_ns INTEGER, read_ns INTEGER, sha BLOB, caption TEXT, reason TEXT
) WITHOUT ROWID;
INSERT INTO meta SELECT name, value FROM new.meta;
INSERT INTO files SELECT path, size, mtime_ns, caption_size, caption_mtime_ns, read_ns, sha,
    caption, reason FROM new.files;
CREATE TABLE embeddings (
    sha BLOB PRIMARY KEY, crc INTEGER NOT NULL, vector BLOB NOT NULL
);
INSERT INTO embeddings SELECT * FROM new.embeddings;
"""


def test_a_memory_without_checksums_opens_and_gets_them(index):
    """As it was written before rows had checksums."""
    index.put(a=1, b=2)
    index.build()
    new = (index.out / "work.sqlite").rename(index.out / "new.sqlite")
    with closing(sqlite3.connect(index.out / "work.sqlite")) as db:
        db.execute("ATTACH ? AS new", (str(new),))
        db.executescript(OLD)
    new.unlink()
    shutil.rmtree(max(index.out.glob("g-*")))  # the vectors are to come from the memory
    problems = verify(index.out).problems
    assert len(problems) == 4 and all("the file is missing" in line for line in problems)
    FakeEncoder.encoded = 0
    index.build()
    assert FakeEncoder.encoded == 0
    index.whole(a=1, b=2)
    flip(index.out / "work.sqlite", b"b.ppm")
    assert len(verify(index.out).problems) == 1


DAMAGE = {
    "zeroed": lambda data: bytes(len(data)),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "empty")]


@pytest.mark.parametrize("how", ["zeroed", *SLOW])
def test_every_damaged_file_is_named_and_mended(index, how):
    index.put(**{f"n{i}": i for i in range(40)})
    (index.root / "bad.jpg").write_bytes(b"no image")
    build(bundle(index.root.parent / "b", captions=range(9)), index.root, index.out)
    index.bundle = index.root.parent / "b"
    names = {re.sub("g-[0-9]+", "g-*", name) for name in index.files()}
    assert len(names) == 13
    for name in names - ({"work.sqlite"} if how == "empty" else set()):  # an empty one is a new one
        path = max(index.out.glob(name))
        path.write_bytes(DAMAGE[how](path.read_bytes()))
        verdict = verify(index.out)
        if name != "quarantine.jsonl":  # a list for people: it is not checked, and written anew
            assert verdict.problems, f"{name}: {how}, and not noticed"
        assert all(path.name in line or path.parent.name in line for line in verdict.problems), name
        assert "crosstill index" in verdict.mend
        if path.parent != index.out or name == "index.json":
            with pytest.raises((CorruptError, ModelError), match=path.name):
                Searcher.open(index.out)
        index.build()
        index.whole(**{f"n{i}": i for i in range(40)})
        assert index.quarantined() == {"bad.jpg": "not an image"}


def test_missing_files_are_named_and_mended(index):
    index.put(a=1, b=2)
    index.build()
    for pattern in (
        "g-*/vectors.faiss",
        "g-*/photos.sqlite",
        "g-*/vectors.json",
        "bundle-*/image.onnx",
    ):
        path = max(index.out.glob(pattern))
        path.unlink()
        with pytest.raises((CorruptError, ModelError), match=f"{path.name}.*missing"):
            Searcher.open(index.out)
        assert any(path.name in line for line in verify(index.out).problems)
        index.build()
        index.whole(a=1, b=2)


# --- what is refused ---


def refuse(error: type, match: str, *arguments, **options) -> None:
    with pytest.raises(error, match=match) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_an_index_of_another_bundle_is_refused_unless_rebuilt(index, tmp_path):
    index.put(a=1, b=2)
    index.build()
    other = bundle(tmp_path / "other", weights="second")
    before = index.files()
    match = "is the index of another bundle than .*other: not the same weights; .*--rebuild$"
    refuse(MismatchError, match, other, index.root, index.out)
    assert index.files() == before
    assert build(other, index.root, index.out, rebuild=True).encoded == 2
    index.whole(a=1, b=2)


def test_folders_without_photos_are_refused(index, tmp_path):
    refuse(DataError, "photos: no photo in it", index.bundle, index.root, index.out)
    refuse(DataError, "nowhere: no such folder", index.bundle, tmp_path / "nowhere", index.out)
    (index.root / "a.txt").touch()
    refuse(DataError, "a.txt: no such folder", index.bundle, index.root / "a.txt", index.out)
    (index.root / "bad.jpg").write_bytes(b"no image")
    refuse(
        DataError,
        r"none of its photos can be read; .*quarantine\.jsonl says why",
        index.bundle,
        index.root,
        index.out,
    )
    assert index.quarantined() == {"bad.jpg": "not an image"}


def test_an_emptied_folder_does_not_empty_the_index(index):
    """Such as the mount point of a drive that is not there."""
    index.put(a=1)
    index.build()
    (index.root / "a.ppm").unlink()
    refuse(DataError, "no photo in it", index.bundle, index.root, index.out)
    assert len(Searcher.open(index.out)) == 1


def test_half_a_bundle_is_refused(index):
    index.put(a=1)
    (index.bundle / "text.onnx").unlink()
    refuse(ModelError, "half a bundle, text.onnx is missing", index.bundle, index.root, index.out)
    assert not index.out.exists()


def test_a_folder_of_other_things_is_no_place_for_an_index(index, tmp_path):
    index.put(a=1)
    refuse(ConfigError, "holds a.ppm and no index", index.bundle, index.root, index.root)
    (tmp_path / "file").touch()
    refuse(InputError, "file: cannot write there", index.bundle, index.root, tmp_path / "file")


def test_an_index_that_is_being_built_is_refused(index):
    index.put(a=1)
    index.build()
    with locked(index.out):
        refuse(LockedError, "in use by process", index.bundle, index.root, index.out)
        assert len(Searcher.open(index.out)) == 1, "readers need no lock"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 0}, "--workers 0: give 1 or more"),
        ({"threads": -1}, "--threads -1: give 1 or more"),
        ({"milvus": "somewhere"}, "--milvus somewhere: no Milvus"),
        ({"milvus": "http://user:secret@host:1"}, "give it in the variable MILVUS_TOKEN"),
    ],
)
def test_options_that_cannot_be(index, options, match):
    index.put(a=1)
    refuse(ConfigError, match, index.bundle, index.root, index.out, **options)


def test_vectors_that_are_not_finite_are_refused(index, monkeypatch):
    class Broken(FakeEncoder):
        def encode_images(self, images):
            return np.full((len(images), self.dim), np.nan, np.float32)

    index.put(a=1)
    monkeypatch.setattr(index_builder, "Encoder", Broken)
    refuse(ModelError, "vectors are not finite", index.bundle, index.root, index.out)


# --- the threads that read ---


def test_photos_come_in_order_and_never_too_far_ahead(monkeypatch):
    monkeypatch.setattr(scan, "AHEAD", 3)
    begun = []

    def read(name, stamp):
        begun.append(name)
        time.sleep(0.001 * (stamp % 3))
        return name

    names = {str(n): n for n in range(60)}
    for count, name in enumerate(scan.ahead(read, names, 4)):
        assert name == str(count)
        assert len(begun) <= count + 1 + 3 * 4
    assert sorted(begun) == sorted(names)


def test_an_error_in_a_reader_ends_the_build(index, monkeypatch):
    index.put(**{f"n{i}": i for i in range(200)})
    monkeypatch.setattr(scan, "read_caption", None)
    (index.root / "n7.txt").write_text("x")
    with pytest.raises(TypeError):
        index.build(workers=2)


# --- Milvus ---


@pytest.fixture
def lite(tmp_path):
    pytest.importorskip("milvus_lite")
    return str(tmp_path / "vectors.db")


def test_vectors_may_live_in_milvus(index, lite, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "user:secret")
    index.put(**{f"n{i}": i for i in range(30)})
    index.build(milvus=lite)
    pointer = index_folder.read_pointer(index.out)
    assert pointer.kind == "milvus" and pointer.milvus["uri"] == "../vectors.db"
    assert list(pointer.files) == ["photos.sqlite"]
    assert not any(b"secret" in data for data in index.files().values())
    index.put(n0=100, new=101)
    (index.root / "n1.ppm").unlink()
    assert index.counts() == {"unchanged": 28, "changed": 1, "new": 1, "deleted": 1, "encoded": 2}
    assert index_folder.read_pointer(index.out).milvus == pointer.milvus
    index.whole(**{f"n{i}": i for i in range(2, 30)}, n0=100, new=101)
    held = index_folder.open_vectors(index.out, index_folder.read_pointer(index.out))
    assert len(held) == 30, "what has gone is removed"
    # one without a photo, as a killed build leaves it, is never found; one that is lost is mended
    held.add(np.array([999]), row(2)[None])
    held.remove(np.array([3]))
    held.close()
    opened = Searcher.open(index.out)
    assert opened.find(row(2)[None], 3)[0][0].id == sha(2)
    assert len(opened.find(row(2)[None], 1)[0]) == 1
    opened.close()
    assert "1 have no vector" in verify(index.out).problems[0]
    index.build()
    index.whole(**{f"n{i}": i for i in range(2, 30)}, n0=100, new=101)


def test_an_index_moves_to_milvus(index, lite):
    index.put(a=1, b=2)
    index.build()
    (index.root / "b.ppm").unlink()
    assert index.counts(milvus=lite) == {"unchanged": 1, "deleted": 1}
    assert index_folder.read_pointer(index.out).kind == "milvus"
    index.whole(a=1)
    first = index_folder.read_pointer(index.out).milvus
    assert index.counts() == {"unchanged": 1}
    assert index.counts(rebuild=True) == {"new": 1, "encoded": 1}
    again = index_folder.read_pointer(index.out).milvus
    assert again["uri"] == first["uri"] and again["collection"] != first["collection"]
    index.whole(a=1)


def test_a_milvus_file_beside_the_index_moves_with_it(tmp_path, lite):
    index = Index(tmp_path)
    index.put(a=1, b=2)
    place = tmp_path / "w"
    place.mkdir()
    index.out = place / "index"
    index.build(milvus=str(place / "vectors.db"))
    place = place.rename(tmp_path / "w2")
    index.out = place / "index"
    index.whole(a=1, b=2)
    index.put(c=3)
    assert index.counts() == {"unchanged": 2, "new": 1, "encoded": 1}
    index.whole(a=1, b=2, c=3)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("folder_stays", [False, True])
def test_milvus_vectors_that_are_no_longer_there(tmp_path, lite, folder_stays):
    """Elsewhere, by a path from "/": named, never taken for empty, made anew without encoding."""
    index = Index(tmp_path)
    index.put(a=1, b=2)
    index.out = tmp_path / "w/index"
    (tmp_path / "elsewhere").mkdir()
    old = tmp_path / "elsewhere/vectors.db"
    index.build(milvus=str(old))
    if folder_stays:
        shutil.rmtree(old)
    else:
        (tmp_path / "elsewhere").rename(tmp_path / "elsewhere2")
    match = f"{old}: the vectors of this index were there and are gone; .* --milvus NEW.db"
    with pytest.raises(CorruptError, match=match):
        Searcher.open(index.out)
    verdict = verify(index.out)
    assert len(verdict.problems) == 1 and re.match(match, verdict.problems[0])
    assert verdict.mend.endswith(f" --out {index.out} --milvus NEW.db")
    assert not old.exists(), "looking makes nothing"
    if not folder_stays:
        match = f"{old}: no such folder for vectors; make it, or name another place with --milvus"
        with pytest.raises(ConfigError, match=match):
            index.build()
    FakeEncoder.encoded = 0
    index.build(milvus=lite if folder_stays else str(tmp_path / "elsewhere2/vectors.db"))
    assert FakeEncoder.encoded == 0
    index.whole(a=1, b=2)


def test_a_milvus_file_that_is_lost_is_made_anew(index, lite, caplog):
    index.put(a=1, b=2)
    index.build(milvus=lite)
    shutil.rmtree(lite)
    FakeEncoder.encoded = 0
    index.build()
    assert FakeEncoder.encoded == 0 and "are gone; now it is made anew" in caplog.text
    index.whole(a=1, b=2)
