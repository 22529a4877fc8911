import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder, bundle, put, row

from crosstill import files
from crosstill.bundle import Bundle
from crosstill.errors import CrosstillError, DataError, LockedError
from crosstill.search import index_builder, index_folder, searcher
from crosstill.search.builder_memory import Memory
from crosstill.search.index_builder import build
from crosstill.search.index_folder import Pointer
from support import flip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(index_builder, "Encoder", FakeEncoder)
    monkeypatch.setattr(searcher, "Encoder", FakeEncoder)
    put(tmp_path / "photos", a=1, b=2, c=3)
    build(bundle(tmp_path / "bundle"), tmp_path / "photos", tmp_path / "index")
    return tmp_path


def check(place: Path) -> index_folder.Verdict:
    found = index_folder.verify(place / "index")
    for line in (*found.problems, *found.outdated):
        assert "\n" not in line
    return found


def reseal(place: Path, **changes: object) -> None:
    """Change what the pointer says, as one would who keeps its seal whole."""
    path = place / "index/index.json"
    files.write_json(path, files.sealed(files.read_json(path) | changes))


def digests(place: Path) -> dict[str, str]:
    folder = index_folder.generation_folder(
        place / "index", index_folder.read_pointer(place / "index").generation
    )
    return index_folder.digest_files(folder)


def test_a_whole_index(place):
    found = check(place)
    assert (found.photos, found.problems, found.outdated) == (3, [], [])
    args = [
        str(place / "index" / index_folder.read_pointer(place / "index").bundle),
        str(place / "photos"),
    ]
    assert found.mend == f"crosstill index {args[0]} {args[1]} --out {place / 'index'}"


def test_nothing_is_changed_by_looking(place):
    def contents():
        paths = (path for path in (place / "index").rglob("*") if path.name != ".lock")
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = contents()
    check(place)
    assert contents() == before


def test_photos_that_are_gone_or_changed_are_listed(place):
    (place / "photos/a.ppm").unlink()
    put(place / "photos", b=9)
    os.utime(place / "photos/c.ppm", ns=(5, 5))
    found = check(place)
    assert found.problems == []
    assert found.outdated == [
        "a.ppm: No such file or directory",
        "b.ppm: changed since it was indexed",
        "c.ppm: changed since it was indexed",
    ]
    shutil.rmtree(place / "photos")
    found = check(place)
    assert found.outdated == [f"{place / 'photos'}: all 3 photos in it are gone"]
    assert (found.gone, found.changed) == (3, 0)


def test_names_are_escaped(place):
    (place / "photos" / os.fsdecode(b"\xff\n.ppm")).write_bytes(b"P6 1 1 255\nabc")
    build(place / "bundle", place / "photos", place / "index")
    (place / "photos" / os.fsdecode(b"\xff\n.ppm")).unlink()
    assert check(place).outdated == [r"\xff\n.ppm: No such file or directory"]


def test_vectors_that_do_not_fit_the_catalogue(place):
    """As a bug would leave them: every seal is whole, and yet they disagree."""
    index = place / "index"
    pointer = index_folder.read_pointer(index)
    folder = index_folder.generation_folder(index, pointer.generation)
    held = index_folder.open_vectors(index, pointer)
    held.remove(np.array([1]))
    held.add(np.array([77, 78]), np.stack([row(7), row(8)]))
    held.save(folder)
    reseal(place, files=digests(place))
    assert check(place).problems == [
        f"{folder}: 3 photos were published, the catalogue holds 3, of which 1 have no vector, "
        "and 2 vectors have no photo; run `crosstill index` again, which mends it"
    ]
    held.remove(np.array([77, 78]))
    held.add(np.array([1]), row(1)[None] / 2)
    held.save(folder)
    reseal(place, files=digests(place))
    assert "1 vectors are not of unit length" in check(place).problems[0]


def test_several_problems_are_all_named(place):
    index = place / "index"
    max(index.glob("bundle-*/image.onnx")).write_bytes(b"other")
    for name in ("vectors.faiss", "vectors.npy"):
        max(index.glob(f"g-*/{name}")).write_bytes(b"")
    with sqlite3.connect(index / "work.sqlite") as db:
        db.execute("UPDATE embeddings SET crc = crc + 1")
    db.close()
    problems = check(place).problems
    assert len(problems) == 4
    names = ("vectors.faiss", "vectors.npy", "image.onnx", "work.sqlite")
    for name, line in zip(names, problems, strict=True):
        assert name in line
    # its own bundle is damaged: another copy of it has to be given
    assert check(place).mend.startswith("crosstill index BUNDLE ")
    build(place / "bundle", place / "photos", index)
    assert check(place).problems == []


def test_a_bundle_of_another_identity_in_the_index(place):
    other = bundle(place / "other", "second")
    own = max((place / "index").glob("bundle-*"))
    shutil.rmtree(own)
    shutil.copytree(other, own)
    assert "is not the index's bundle: not the same weights" in check(place).problems[0]


def test_a_damaged_pointer_is_the_only_problem(place):
    pointer = place / "index/index.json"
    pointer.write_bytes(pointer.read_bytes().replace(b'"generation": 1', b'"generation": 2'))
    found = check(place)
    assert found.photos == 0 and len(found.problems) == 1
    assert "index.json: its checksum is wrong; run `crosstill index` again" in found.problems[0]
    assert found.mend == f"crosstill index BUNDLE FOLDER --out {place / 'index'}"


def test_a_quarantine_list_is_for_people_and_is_written_anew(place):
    (place / "photos/bad.jpg").write_bytes(b"no image")
    build(place / "bundle", place / "photos", place / "index")
    path = place / "index/quarantine.jsonl"
    path.write_bytes(b"")
    assert check(place).problems == []
    build(place / "bundle", place / "photos", place / "index")
    assert check(place).problems == [] and b"bad.jpg" in path.read_bytes()


def test_an_index_that_sealed_its_quarantine_list_is_whole_and_goes_on(place):
    """Until 2026-11 the memory held the SHA-256 of the list."""
    bundle_used = Bundle.open(place / "bundle")
    memory = Memory(place / "index/work.sqlite", bundle_used.fingerprint, place / "photos")
    memory.put("sheets", ["0" * 64])
    memory.close()
    assert check(place).problems == []
    put(place / "photos", d=4)
    built = build(place / "bundle", place / "photos", place / "index")
    assert (built.new, built.unchanged, built.encoded) == (1, 3, 1)
    assert check(place).problems == []


def test_a_lost_memory_is_no_problem(place):
    (place / "index/work.sqlite").unlink()
    assert check(place).problems == []


def test_what_cannot_be_checked(place, tmp_path):
    with pytest.raises(DataError, match="no such index"):
        index_folder.verify(tmp_path / "nowhere")
    with files.locked(place / "index"), pytest.raises(LockedError, match="in use by process"):
        index_folder.verify(place / "index")


def test_every_flipped_bit_is_noticed(place):
    """One at a time, at places spread over all files that readers depend on."""
    index, draw = place / "index", np.random.default_rng(0)
    pointer: Pointer = index_folder.read_pointer(index)
    folder = index_folder.generation_folder(index, pointer.generation)
    for path in [*folder.iterdir(), *(index / pointer.bundle).iterdir(), index / "index.json"]:
        whole = path.read_bytes()
        for _ in range(3):
            damaged = bytearray(whole)
            damaged[draw.integers(len(whole))] ^= 1 << int(draw.integers(8))
            path.write_bytes(damaged)
            problems = check(place).problems
            assert problems and path.name in problems[0], path
            with pytest.raises(CrosstillError):
                searcher.Searcher.open(index)
        path.write_bytes(whole)
    assert check(place).problems == []


def rows_of(path: Path) -> list[list[tuple]] | None:
    """All rows of a memory; None where SQLite cannot read them."""
    tables = ("meta", "files", "unused", "embeddings")
    try:
        with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as db:
            return [db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    except (sqlite3.Error, UnicodeDecodeError):
        return None


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_the_memory_is_noticed_or_is_in_no_row(place, count):
    put(place / "photos", **{f"more{seed}": seed for seed in range(40)})
    (place / "photos/a.txt").write_text("a dog on snow")
    build(place / "bundle", place / "photos", place / "index")
    path, draw, noticed = place / "index/work.sqlite", np.random.default_rng(0), 0
    whole, rows = path.read_bytes(), rows_of(path)
    assert rows is not None and [len(table) for table in rows] == [3, 43, 0, 40]
    for _ in range(count):
        path.write_bytes(flip(whole, draw))
        changed = rows_of(path) != rows
        problems = check(place).problems
        assert all("work.sqlite" in line for line in problems)
        assert problems or not changed
        noticed += bool(problems)
    assert noticed > count // 4
