"""photos.sqlite: the photos of one generation of an index, their paths and captions.

A photo is its bytes: two files with the same bytes are one photo with two paths. Its number, by
which the vectors know it, is never given to another photo, however many generations follow.
Paths are stored as bytes, since a disk knows no other names.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple
from urllib.parse import quote

from crosstill import artefacts
from crosstill.errors import CorruptError, RunError

NAME = "photos.sqlite"
REMEDY = "run `crosstill index` again, which mends it"  # of damage

_TABLES = """
CREATE TABLE IF NOT EXISTS photos (
    id INTEGER PRIMARY KEY AUTOINCREMENT, sha BLOB NOT NULL UNIQUE
);
CREATE TABLE IF NOT EXISTS paths (
    path BLOB PRIMARY KEY, photo INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, caption TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS paths_of_photo ON paths (photo);
"""
_WRONG = (
    "SELECT 1 FROM photos WHERE typeof(sha) != 'blob' OR length(sha) != 32 OR id < 0 LIMIT 1",
    "SELECT 1 FROM paths WHERE typeof(path) != 'blob' OR instr(path, x'00') OR "
    "typeof(photo) != 'integer' OR typeof(size) != 'integer' OR typeof(mtime_ns) != 'integer' OR "
    "typeof(caption) != 'text' LIMIT 1",
)
_LARGEST = 1 << 24  # bytes of one value
_ENTRIES = """
SELECT photos.id, sha, path, size, mtime_ns, caption FROM photos JOIN paths ON photo = photos.id
"""
_ELSEWHERE = {  # the fault lies not in the file
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_PERM,
}


class Row(NamedTuple):
    """One file: SHA-256 of its bytes, size, time in ns, caption."""

    sha: bytes
    size: int
    mtime_ns: int
    caption: str


class Entry(NamedTuple):
    """One photo: its number, SHA-256 in hex, first path, and size, time and caption there.

    The caption is the first that any of its paths has.
    """

    id: int
    sha: str
    path: str
    size: int
    mtime_ns: int
    caption: str


class Change(NamedTuple):
    """A change of the vectors: numbers and SHA-256 to add, numbers to remove."""

    added: list[tuple[int, bytes]]
    removed: list[int]


class Catalogue:
    """A finished catalogue, for reading. Several threads may share one.

    Raises:
        CorruptError: it is damaged, here and in every method.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        where = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"
        with guarded(path):
            artefacts.member(path.parent, path.name)
            self._db = sqlite3.connect(where, uri=True, check_same_thread=False)
            check_tables(self._db, _TABLES)  # which says so where there is no such file
            self._file = path.stat()
            self._check_types()
            self._count = self._all("SELECT count(*) FROM photos")[0][0]

    def __len__(self) -> int:
        return self._count

    def rows(self) -> dict[str, Row]:
        """Return all files by their path."""
        with guarded(self.path):
            return _rows(self._db)

    def numbers(self) -> dict[bytes, int]:
        """Return the number of every photo, by its SHA-256."""
        return dict(self._all("SELECT sha, id FROM photos"))

    def entries(self, numbers: Iterable[int]) -> dict[int, Entry]:
        """Return the photos of these numbers; those that do not exist are left out."""
        wanted = ",".join(map(str, map(int, numbers)))
        rows = self._all(f"{_ENTRIES} WHERE photos.id IN ({wanted}) ORDER BY path")
        return {entry.id: entry for entry in _grouped(rows)}

    def find(self, sha: str) -> Entry | None:
        """Return the photo of a SHA-256 in hex, None where there is none."""
        rows = self._all(f"{_ENTRIES} WHERE sha = ? ORDER BY path", bytes.fromhex(sha))
        return next(_grouped(rows), None)

    def check(self) -> None:
        """Let SQLite read every page."""
        report = self._all("PRAGMA integrity_check")
        if report != [("ok",)]:
            raise damaged(self.path, str(report[0][0]))

    def close(self) -> None:
        self._db.close()

    def _check_size(self) -> None:
        """Notice a file that was cut or emptied in place: SQLite goes on with the pages it has.

        Another file at the path, or none, is no fault: this one stays open.
        """
        with suppress(OSError):
            file = self.path.stat()
            if file.st_ino == self._file.st_ino and file.st_size != self._file.st_size:
                raise damaged(self.path, f"{file.st_size} bytes, {self._file.st_size} when opened")

    def _check_types(self) -> None:
        """Refuse values of other types, which SQLite keeps in any column."""
        for query in _WRONG:
            if self._db.execute(query).fetchone():
                raise damaged(self.path, "a value of a wrong type")

    def _all(self, query: str, *values: object) -> list[tuple]:
        with self._lock, guarded(self.path):
            self._check_size()
            return self._db.execute(query, values).fetchall()


def write(path: Path, base: Path | None, rows: dict[str, Row]) -> Change:
    """Write a catalogue of exactly these files.

    Args:
        path: where; nothing may be there.
        base: the catalogue of the generation before, whose numbers are kept.
        rows: what is known of every file, by its path.

    Raises:
        RunError: the disk is full, or cannot be written to.
        CorruptError: the base is damaged.
    """
    if base:
        shutil.copyfile(base, path)
    with guarded(path), closing(sqlite3.connect(path, isolation_level=None)) as db:
        # It counts only once it is whole and flushed: see `index_folder`.
        db.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_TABLES} BEGIN")
        added = _put(db, rows, _rows(db))
        removed = [n for (n,) in db.execute("SELECT id FROM photos EXCEPT SELECT photo FROM paths")]
        db.executemany("DELETE FROM photos WHERE id = ?", ((number,) for number in removed))
        db.execute("COMMIT")
    return Change(added, removed)


def check_tables(db: sqlite3.Connection, tables: str) -> None:
    """Refuse a database with other tables than these: views and triggers are programs.

    Args:
        db: the database; no value of it may be longer than a path or a caption ever is.
        tables: SQL that makes the tables that there should be.

    Raises:
        sqlite3.DatabaseError: it has others.
    """
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    with closing(sqlite3.connect(":memory:")) as plain:
        plain.executescript(tables)
        wanted = [
            tuple(" ".join(str(cell).split()) for cell in row) for row in plain.execute(query)
        ]
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST)
    schema = [tuple(" ".join(str(cell).split()) for cell in row) for row in db.execute(query)]
    if schema != wanted:
        raise sqlite3.DatabaseError("not the tables that crosstill makes")


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line: a `RunError` where the disk is at fault."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):  # ours, not the file's
        raise
    except (sqlite3.Error, UnicodeDecodeError) as error:  # a flipped bit in the name of a column
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _ELSEWHERE:
            advice = "mend that, then run the same command again"
            raise RunError(f"{path}: cannot be written ({error}); {advice}") from None
        raise damaged(path, str(error)) from None


def damaged(path: Path, reason: str) -> CorruptError:
    """Make the error for a damaged part of an index."""
    return CorruptError(f"{path}: {reason}; {REMEDY}")


def _put(db: sqlite3.Connection, rows: dict[str, Row], old: dict[str, Row]) -> list:
    """Update the tables to these rows; return the photos that are new."""
    known = {sha for (sha,) in db.execute("SELECT sha FROM photos")}
    new = list(dict.fromkeys(row.sha for row in rows.values() if row.sha not in known))
    db.executemany("INSERT INTO photos (sha) VALUES (?)", ((sha,) for sha in new))
    db.executemany(
        "INSERT OR REPLACE INTO paths SELECT ?, id, ?, ?, ? FROM photos WHERE sha = ?",
        ((os.fsencode(p), *row[1:], row.sha) for p, row in rows.items() if old.get(p) != row),
    )
    gone = ((os.fsencode(path),) for path in old.keys() - rows.keys())
    db.executemany("DELETE FROM paths WHERE path = ?", gone)
    numbers = dict(db.execute("SELECT sha, id FROM photos"))
    return [(numbers[sha], sha) for sha in new]


def _rows(db: sqlite3.Connection) -> dict[str, Row]:
    query = "SELECT path, sha, size, mtime_ns, caption FROM paths JOIN photos ON id = photo"
    return {os.fsdecode(path): Row(*rest) for path, *rest in db.execute(query)}


def _grouped(rows: Iterable[tuple]) -> Iterator[Entry]:
    """Group the rows of a photo's paths, which come in order, to one entry a photo."""
    photos: dict[int, Entry] = {}
    for number, sha, path, size, mtime_ns, caption in rows:
        first = photos.get(number)
        if first is None:
            first = Entry(number, sha.hex(), os.fsdecode(path), size, mtime_ns, caption)
        photos[number] = first if first.caption else first._replace(caption=caption)
    yield from photos.values()
