"""work.sqlite: the files and vectors that the builder of an index remembers between runs.

Which file had which content when it was last read, and the vector of every content. Readers never
see it. It can be lost: files are then read again, and vectors taken from the last generation. Every
row has a checksum, all of which are compared when the memory is opened.
"""

import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from crosstill import artefacts
from crosstill.errors import CorruptError
from crosstill.search.catalogue import check_tables, damaged, guarded
from crosstill.search.scan import KnownFile, Stamp

log = logging.getLogger(__name__)

FORMAT = 2  # 1 had no checksums but of vectors, and no ctimes
NOTES = 1000  # files that are remembered at a time where nothing has to be encoded
KEPT_DAYS = 30  # for which the vector of a content that no file has any more is kept

# The last column is the CRC-32 of the others; of a vector, for age's sake, it is the second.
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT, crc INTEGER);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, caption_size INTEGER,
    caption_mtime_ns INTEGER, caption_ctime_ns INTEGER, read_ns INTEGER, sha BLOB, caption TEXT,
    reason TEXT, crc INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unused (sha BLOB PRIMARY KEY, since_ns INTEGER, crc INTEGER);
"""
_EMBEDDINGS = """
CREATE TABLE IF NOT EXISTS embeddings (
    sha BLOB PRIMARY KEY, crc INTEGER NOT NULL, vector BLOB NOT NULL
);
"""
_TABLES += _EMBEDDINGS
_TABLES_1 = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, caption_size INTEGER,
    caption_mtime_ns INTEGER, read_ns INTEGER, sha BLOB, caption TEXT, reason TEXT
) WITHOUT ROWID;
{_EMBEDDINGS}
"""
_TYPES = {  # of the columns of each table; SQLite keeps a value of any type in any column
    "meta": ("text", "text", "integer"),
    "files": ("blob", *["integer"] * 7, "blob or null", "text", "text", "integer"),
    "unused": ("blob", "integer", "integer"),
    "embeddings": ("blob", "integer", "blob"),
}


class Memory:
    """The memory of one index, open for one builder.

    Args:
        path: of the file; a damaged one is thrown away.
        key: what the vectors belong to; with another one, everything is forgotten.
        root: where the photos are; files of another place are forgotten, contents are not.

    Attributes:
        known: what is remembered of each file, by its path.
        shas: of the contents whose vectors are kept.
    """

    def __init__(self, path: Path, key: str, root: Path) -> None:
        self.path, self._noted = path, 0
        self._unused: dict[bytes, int] = {}  # contents that no file has, and since when
        _check_links(path)
        try:
            self._open(key, root)
        except CorruptError as error:
            log.warning("%s; now it is thrown away and made anew", str(error).partition(";")[0])
            self._open(key, root)

    def note(self, path: str, known: KnownFile) -> None:
        """Remember a file."""
        self.known[path] = known
        with self._guarded():
            self._put("files", os.fsencode(path), *known.stamp, *known[1:])
            self._noted += 1
            if self._noted % NOTES == 0:
                self._db.commit()

    def keep(self, shas: Sequence[bytes], vectors: np.ndarray) -> None:
        """Remember vectors (N, D) float32 of N contents, and flush all that was noted."""
        blobs = [row.tobytes() for row in np.ascontiguousarray(vectors, np.float32)]
        rows = ((s, zlib.crc32(blob), blob) for s, blob in zip(shas, blobs, strict=True))
        with self._guarded():
            self._db.executemany("INSERT OR REPLACE INTO embeddings VALUES (?,?,?)", rows)
        self.shas.update(shas)
        self.commit()

    def vectors(self, shas: Sequence[bytes]) -> np.ndarray:
        """Return the vectors (N, D) of N > 0 contents."""
        query = "SELECT crc, vector FROM embeddings WHERE sha = ?"
        with self._guarded():
            rows = [self._db.execute(query, (sha,)).fetchone() for sha in shas]
            if not all(row and zlib.crc32(row[1]) == row[0] for row in rows):
                raise damaged(self.path, "a vector is not as it was written")
        return np.stack([np.frombuffer(blob, np.float32) for _, blob in rows])

    def forget(self, paths: Iterable[str], unused: Iterable[bytes]) -> None:
        """Forget files that are gone, and contents that no file has had for `KEPT_DAYS`."""
        paths, now = list(paths), time.time_ns()
        since = {sha: self._unused.get(sha, now) for sha in unused}
        dead = [sha for sha, when in since.items() if when + KEPT_DAYS * 86_400 * 10**9 <= now]
        kept = since.keys() - dead
        with self._guarded():
            gone = ((os.fsencode(path),) for path in paths)
            self._db.executemany("DELETE FROM files WHERE path = ?", gone)
            self._db.executemany("DELETE FROM embeddings WHERE sha = ?", ((s,) for s in dead))
            again = ((sha,) for sha in self._unused.keys() - kept)
            self._db.executemany("DELETE FROM unused WHERE sha = ?", again)
            for sha in kept - self._unused.keys():
                self._put("unused", sha, now)
        for path in paths:
            self.known.pop(path, None)
        self.shas.difference_update(dead)
        self._unused = {sha: since[sha] for sha in kept}
        self.commit()

    def get(self, name: str) -> Any:
        """Return a remembered value, None where there is none."""
        with self._guarded():
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            with artefacts.readable(self.path):
                return json.loads(row[0]) if row else None

    def put(self, name: str, value: Any) -> None:
        """Remember a value that JSON can hold."""
        with self._guarded():
            self._put("meta", name, json.dumps(value))
        self.commit()

    def commit(self) -> None:
        with self._guarded():
            self._db.commit()

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        with guarded(self.path):
            self._db.close()

    def _open(self, key: str, root: Path) -> None:
        with self._guarded():
            self._db = sqlite3.connect(self.path)
            # One builder at a time, so that nothing need be shared with other processes.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._upgrade()
            self._db.executescript(_TABLES)
            check_tables(self._db, _TABLES)
            _check(self._db, self.path)
            self._settle({"format": FORMAT, "key": key}, str(root))
            self.known = _files(self._db)
            self.shas = {sha for (sha,) in self._db.execute("SELECT sha FROM embeddings")}
            self._unused = dict(self._db.execute("SELECT sha, since_ns FROM unused"))

    def _upgrade(self) -> None:
        """Add checksums to the rows of format 1, and drop its files, which have no ctimes."""
        if _columns(self._db, "meta")[-1:] != ["value"]:
            return
        check_tables(self._db, _TABLES_1)
        values = self._db.execute("SELECT name, value FROM meta").fetchall()
        self._db.executescript(f"BEGIN; DROP TABLE files; DROP TABLE meta; {_TABLES}")
        for name, value in (*values, ("format", json.dumps(FORMAT))):
            self._put("meta", name, value)
        self._db.commit()

    def _put(self, table: str, *values: bytes | str | int | None) -> None:
        places = ",".join("?" * (len(values) + 1))
        row = (*values, _crc(values))
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({places})", row)

    def _settle(self, wanted: dict[str, Any], root: str) -> None:
        """Forget vectors of another key, and files of another folder."""
        if any(self.get(name) != value for name, value in wanted.items()):
            self._db.execute("DELETE FROM embeddings")
            self._db.execute("DELETE FROM unused")
        elif self.get("root") == root:
            return
        self._db.execute("DELETE FROM files")
        self._db.execute("DELETE FROM meta")
        for name, value in (*wanted.items(), ("root", root)):
            self.put(name, value)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Delete a memory that turns out to be damaged: the next run makes it anew."""
        try:
            with guarded(self.path):
                yield
        except CorruptError:
            self._db.close()
            for path in self.path.parent.glob(f"{self.path.name}*"):
                path.unlink()
            raise


def check(path: Path) -> None:
    """Read a whole memory, and compare every row with its checksum.

    Raises:
        CorruptError: it is damaged.
    """
    with _reading(path) as db:
        _check(db, path)


def read_files(path: Path) -> dict[str, KnownFile]:
    """Read the files that a whole memory knows, by path; none of an older version's."""
    with _reading(path) as db:
        return _files(db) if _columns(db, "files")[-1:] == ["crc"] else {}


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    _check_links(path)
    with guarded(path), closing(sqlite3.connect(path)) as db:
        # What a kill left in the log is read without a file shared with other processes.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        older = _columns(db, "meta")[-1:] == ["value"]
        check_tables(db, _TABLES_1 if older else _TABLES)
        yield db


def _check_links(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        artefacts.member(path.parent, path.name + suffix)


def _files(db: sqlite3.Connection) -> dict[str, KnownFile]:
    rows = db.execute("SELECT * FROM files")
    return {os.fsdecode(path): KnownFile(Stamp(*row[:6]), *row[6:-1]) for path, *row in rows}


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Let SQLite read every page, and compare every row with its checksum.

    Raises:
        CorruptError: one differs.
    """
    pages = db.execute("PRAGMA integrity_check").fetchone()[0]
    if pages != "ok":
        raise damaged(path, pages)
    _check_types(db, path)
    for table in ("meta", "files", "unused"):
        if _columns(db, table)[-1:] != ["crc"]:  # an older version wrote it
            continue
        for *values, crc in db.execute(f"SELECT * FROM {table}"):
            if _crc(values) != crc:
                raise damaged(path, f"row {values[0]!r} of {table} is not as it was written")
    # a flipped bit may also have made a number or a text of it
    blob = "CASE typeof(vector) WHEN 'blob' THEN vector ELSE x'' END"
    for sha, crc, vector in db.execute(f"SELECT sha, crc, {blob} FROM embeddings"):
        if zlib.crc32(vector) != crc:
            raise damaged(path, f"the vector of {sha.hex()[:12]} is not as it was written")


def _check_types(db: sqlite3.Connection, path: Path) -> None:
    """Refuse values of types that no builder writes.

    Raises:
        CorruptError: there is one.
    """
    for table, types in _TYPES.items():
        columns = _columns(db, table)
        if len(columns) != len(types):  # an older version wrote it
            continue
        wrong = " OR ".join(
            f"instr('{kind}', typeof({column})) = 0"
            for column, kind in zip(columns, types, strict=True)
        )
        if db.execute(f"SELECT 1 FROM {table} WHERE {wrong} LIMIT 1").fetchone():
            raise damaged(path, f"a value of a wrong type in {table}")
    if db.execute("SELECT 1 FROM embeddings WHERE length(sha) != 32 LIMIT 1").fetchone():
        raise damaged(path, "a vector of no SHA-256")
    lengths = db.execute("SELECT DISTINCT length(vector) FROM embeddings LIMIT 2").fetchall()
    if len(lengths) > 1 or any(length % 4 for (length,) in lengths):
        raise damaged(path, "vectors of several lengths")
    if db.execute("SELECT 1 FROM meta WHERE NOT json_valid(value) LIMIT 1").fetchone():
        raise damaged(path, "a value that is not JSON")


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def _crc(values: Sequence[object]) -> int:
    """Return the CRC-32 of a row, which detects every change of up to 32 bits in a run."""
    return zlib.crc32(repr(tuple(values)).encode())
