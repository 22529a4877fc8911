import os
import sqlite3

import numpy as np
import pytest

from crosstill.errors import CorruptError, RunError
from crosstill.search import catalogue
from crosstill.search.catalogue import Catalogue, Entry, Row

A, B, C = (bytes([n]) * 32 for n in range(3))


def rows(**shas: bytes) -> dict[str, Row]:
    return {f"{name}.jpg": Row(sha, 10, 20, "") for name, sha in shas.items()}


def test_what_is_written_is_read(tmp_path):
    given = {
        "a.jpg": Row(A, 1, 2**60, "a dog"),
        os.fsdecode(b"\xff\n.jpg"): Row(B, 2**40, -5, "line\nbreak \U0001f415"),
    }
    change = catalogue.write(tmp_path / "c", None, given)
    assert change == ([(1, A), (2, B)], [])
    found = Catalogue(tmp_path / "c")
    assert len(found) == 2
    assert found.rows() == given
    assert found.numbers() == {A: 1, B: 2}
    assert found.find(A.hex()) == Entry(1, A.hex(), "a.jpg", 1, 2**60, "a dog")
    assert found.find(C.hex()) is None
    assert found.entries([2, 7]) == {
        2: Entry(2, B.hex(), os.fsdecode(b"\xff\n.jpg"), 2**40, -5, "line\nbreak \U0001f415")
    }
    assert found.entries([]) == {}
    found.check()


def test_the_same_bytes_are_one_photo_with_two_paths(tmp_path):
    given = {
        "b.jpg": Row(A, 1, 2, "first said"),
        "a.jpg": Row(A, 3, 4, ""),
        "c.jpg": Row(A, 5, 6, "x"),
    }
    assert catalogue.write(tmp_path / "c", None, given).added == [(1, A)]
    found = Catalogue(tmp_path / "c")
    assert len(found) == 1
    assert found.find(A.hex()) == Entry(1, A.hex(), "a.jpg", 3, 4, "first said")


def test_numbers_are_kept_and_never_given_again(tmp_path):
    catalogue.write(tmp_path / "1", None, rows(a=A, b=B))
    # b goes; c comes, and must not get b's number even though it was the highest
    change = catalogue.write(tmp_path / "2", tmp_path / "1", rows(a=A, c=C))
    assert change == ([(3, C)], [2])
    change = catalogue.write(tmp_path / "3", tmp_path / "2", rows(a=A))
    assert change == ([], [3])
    change = catalogue.write(tmp_path / "4", tmp_path / "3", rows(a=A, b=B))
    assert change == ([(4, B)], [])
    assert Catalogue(tmp_path / "1").numbers() == {A: 1, B: 2}, "the base was changed"


def test_moved_and_changed_files(tmp_path):
    catalogue.write(tmp_path / "1", None, rows(a=A, b=B))
    # a moved to c; b has other bytes now
    change = catalogue.write(tmp_path / "2", tmp_path / "1", rows(c=A, b=C))
    assert change == ([(3, C)], [2])
    found = Catalogue(tmp_path / "2")
    assert found.rows() == rows(c=A, b=C) and found.numbers() == {A: 1, C: 3}
    # two that change places keep their numbers
    assert catalogue.write(tmp_path / "3", tmp_path / "2", rows(c=C, b=A)) == ([], [])
    assert Catalogue(tmp_path / "3").rows() == rows(c=C, b=A)


def test_many_generations_end_like_one(tmp_path):
    random = np.random.default_rng(0)
    base, given = None, {}
    for generation in range(20):
        given = {
            f"{name}": Row(bytes([random.integers(30)]) * 32, 1, generation, "")
            for name in random.choice(40, 25, replace=False)
        }
        path = tmp_path / str(generation)
        catalogue.write(path, base, given)
        base = path
        found = Catalogue(path)
        assert found.rows() == given
        assert found.numbers().keys() == {row.sha for row in given.values()}


@pytest.mark.parametrize("damage", ["zeroed", "cut", "nothing"])
def test_a_damaged_catalogue_is_named(tmp_path, damage):
    path = tmp_path / "photos.sqlite"
    catalogue.write(
        path, None, {f"{n}": Row(bytes(31) + bytes([n]), 1, 2, "x" * 900) for n in range(99)}
    )
    size = path.stat().st_size
    with path.open("r+b") as file:
        if damage == "zeroed":
            file.write(bytes(size))
        file.truncate({"zeroed": size, "cut": size // 2, "nothing": 0}[damage])
    with pytest.raises(CorruptError, match=r"photos\.sqlite: .*run `crosstill index` again"):
        Catalogue(path).rows()


def test_a_full_disk_is_one_line(tmp_path):
    path = tmp_path / "photos.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA max_page_count = 3")
    match = r"photos\.sqlite: cannot be written \(database or disk is full\); mend that"
    with pytest.raises(RunError, match=match), catalogue.guarded(path):
        db.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(100000))")


def test_readers_share_a_catalogue(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    given = {f"{n}": Row(n.to_bytes(32, "big"), n, n, "") for n in range(1, 500)}
    catalogue.write(tmp_path / "c", None, given)
    found = Catalogue(tmp_path / "c")
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda n: found.entries([n])[n].size, list(range(1, 500)) * 4)
    assert list(answers) == list(range(1, 500)) * 4
