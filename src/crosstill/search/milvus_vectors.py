"""Vectors in Milvus: a cluster by its URI, or a Milvus Lite file for one process at a time."""

import fcntl
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from crosstill import extras
from crosstill.errors import ConfigError, LockedError, MismatchError, RunError
from crosstill.search import vector_index

KEY, VECTOR, METRIC = "id", "vector", "IP"
FRESH = "Strong"  # consistency: whoever searches sees all that was added before
CONNECT, CALL = 10.0, 60.0  # seconds until a server that does not answer is an error
MESSAGE = 8 << 20  # bytes of vectors in one message; a cluster takes 64 MB
IDS = 10_000  # in one message
MOST = 16_384  # rows that Milvus returns for one query

_lite: Counter[str] = Counter()  # Milvus Lite files open in this process, each with its own server
_lock = Lock()


class MilvusVectors:
    """A `VectorIndex` in a Milvus collection. All methods may run in many threads at once.

    What Milvus has acknowledged is kept, saved or not. Milvus Lite is meant for some thousands of
    vectors.
    """

    def __init__(self, uri: str, collection: str, dim: int, token: str | None = None) -> None:
        """Connect, and make the collection where there is none.

        Args:
            uri: "http://host:19530", or the path of a Milvus Lite file, which ends in ".db".
            collection: its name: letters, digits and underscores.
            dim: D, of unit vectors.
            token: "user:password" or an API key.

        Raises:
            ConfigError: nothing answers there, the collection cannot have that name, or pymilvus
                or milvus-lite is not installed.
            LockedError: another process has the Milvus Lite file open.
            MismatchError: the collection holds something else, or vectors of another D.
        """
        if not re.fullmatch(r"[A-Za-z_]\w{0,254}", collection, re.ASCII):
            raise ConfigError(f"collection {collection!r}: only letters, digits and _ are possible")
        self._lite = uri.endswith(vector_index.LITE)
        self._uri = str(Path(uri).absolute()) if self._lite else uri
        self.dim, self._name, self._where = dim, collection, _public(uri)
        self._milvus = extras.load("this index", "milvus", "pymilvus")
        if self._lite:
            extras.load("this index", "milvus", "milvus_lite")
        self._client = self._connect(token)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        with self._talking():
            rows = self._query("", ["count(*)"])
        return int(rows[0]["count(*)"])

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        ids, vectors = vector_index.checked_rows(ids, vectors, self.dim)
        for part in _parts(len(ids), self._rows()):
            rows = [
                {KEY: key, VECTOR: row}
                for key, row in zip(ids[part].tolist(), vectors[part], strict=True)
            ]
            with self._talking():
                self._client.upsert(self._name, rows, timeout=CALL)

    def remove(self, ids: np.ndarray) -> None:
        ids = vector_index.checked_ids(ids)
        for part in _parts(len(ids), IDS):
            with self._talking():
                self._client.delete(self._name, ids=ids[part].tolist(), timeout=CALL)

    def search(self, queries: np.ndarray, k: int) -> vector_index.Ranked:
        queries, k = vector_index.checked_vectors(queries, self.dim), vector_index.checked_k(k)
        if k > MOST:
            raise ConfigError(f"k = {k} is not possible; Milvus finds at most {MOST}")
        return vector_index.ranked(partial(self._find, queries), k, MOST)

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        ids = vector_index.checked_ids(ids)
        vectors_by_id: dict[int, np.ndarray] = {}
        for part in _parts(len(ids), min(self._rows(), IDS)):
            with self._talking():
                rows = self._query(f"{KEY} in {ids[part].tolist()}", [KEY, VECTOR])
            vectors_by_id |= {row[KEY]: np.array(row[VECTOR], np.float32) for row in rows}
        wanted = [vectors_by_id[key] for key in ids.tolist()]
        return np.stack(wanted) if wanted else np.empty((0, self.dim), np.float32)

    def ids(self) -> np.ndarray:
        with self._talking():
            rows = self._query(f"{KEY} >= 0", [KEY])
        return np.sort(np.array([row[KEY] for row in rows], np.int64))

    def save(self, folder: Path) -> list[str]:
        """Write no file: Milvus keeps what it acknowledged. Milvus Lite finds faster after this."""
        if self._lite:  # its newest rows lie in a log, which it reads slowly
            with self._talking():
                self._client.flush(self._name)
        return []

    def close(self) -> None:
        """Close the connection; the last one to a Milvus Lite file closes the file."""
        if self._client is None:
            return
        self._client.close()
        self._client = None
        if self._lite:
            _release(self._uri)

    def _find(self, queries: np.ndarray, wide: int) -> vector_index.Ranked:
        """Find the best `wide` rows of each query (Q, D), in Milvus's order."""
        scores = np.full((len(queries), wide), -np.inf, np.float32)
        ids = np.full((len(queries), wide), vector_index.NO_ROW, np.int64)
        for part in _parts(len(queries), max(1, min(self._rows(), MESSAGE // (64 * wide)))):
            for row, hits in enumerate(self._hits(queries[part], wide), part.start):
                scores[row, : len(hits)] = [hit["distance"] for hit in hits]
                ids[row, : len(hits)] = [hit[KEY] for hit in hits]
        return scores, ids

    def _hits(self, queries: np.ndarray, wide: int) -> Any:
        with self._talking():
            return self._client.search(
                self._name,
                list(queries),
                anns_field=VECTOR,
                limit=wide,
                output_fields=[KEY],
                consistency_level=FRESH,
                timeout=CALL,
            )

    def _query(self, condition: str, fields: list[str]) -> Any:
        return self._client.query(
            self._name,
            filter=condition,
            output_fields=fields,
            consistency_level=FRESH,
            timeout=CALL,
        )

    def _rows(self) -> int:
        """Return how many vectors fit one message."""
        return max(1, MESSAGE // (4 * self.dim))

    def _connect(self, token: str | None) -> Any:
        if not self._lite and not vector_index.is_address(self._uri):
            raise ConfigError(f"{self._where}: no Milvus; give http://host:19530 or a *.db path")
        if self._lite and not Path(self._uri).parent.is_dir():
            raise ConfigError(f"{self._where}: no such folder; make it first")
        # it logs a traceback; what matters of it is raised
        logging.getLogger("milvus_lite.server_manager").disabled = True
        with _lock:
            try:
                client = self._milvus.MilvusClient(
                    self._uri, token=token or "", timeout=CONNECT, dedicated=True
                )
            except ValueError as error:  # of Python's parser of URIs
                raise ConfigError(f"{self._where}: not an address ({error})") from None
            except self._milvus.MilvusException as error:
                raise self._no_answer(error) from None
            _lite[self._uri] += self._lite
        return client

    def _no_answer(self, error: Any) -> Exception:
        if not self._lite:
            return ConfigError(
                f"Milvus at {self._where} does not answer ({_line(error)}); "
                "start it, or correct its address or token"
            )
        if _held(Path(self._uri) / "LOCK"):
            return LockedError(f"{self._where} is in use by another process; wait for it")
        return ConfigError(f"{self._where}: not a Milvus Lite file; choose another path")

    def _prepare(self) -> None:
        """Check the collection; create the parts of it that are missing."""
        with self._talking():
            if not self._client.has_collection(self._name, timeout=CALL):
                self._create()
            self._check_fields()
            if self._client.list_indexes(self._name, VECTOR):
                self._check_metric()
            else:
                self._index()
            self._client.load_collection(self._name, timeout=CALL)

    def _create(self) -> None:
        kinds = self._milvus.DataType
        schema = self._milvus.MilvusClient.create_schema(enable_dynamic_field=False)
        schema.add_field(KEY, kinds.INT64, is_primary=True)
        schema.add_field(VECTOR, kinds.FLOAT_VECTOR, dim=self.dim)
        self._client.create_collection(
            self._name, schema=schema, consistency_level=FRESH, timeout=CALL
        )

    def _index(self) -> None:
        """Create an index of the server's choice: Milvus Lite reads every row, a cluster not."""
        index = self._milvus.MilvusClient.prepare_index_params()
        index.add_index(VECTOR, index_type="AUTOINDEX", metric_type=METRIC)
        self._client.create_index(self._name, index, timeout=CALL, sync=False)

    def _check_fields(self) -> None:
        about = self._client.describe_collection(self._name, timeout=CALL)
        fields = {field["name"]: field for field in about["fields"]}
        if set(fields) != {KEY, VECTOR} or not fields[KEY].get("is_primary"):
            raise MismatchError(
                f"{self._what()} has the fields {', '.join(sorted(fields))}, and was not made "
                "here; choose another name"
            )
        dim = int(fields[VECTOR]["params"].get("dim", 0))
        if dim != self.dim:
            raise MismatchError(
                f"{self._what()} holds vectors of {dim} dimensions, and these have {self.dim}; "
                "choose another name"
            )

    def _check_metric(self) -> None:
        description = self._client.describe_index(self._name, VECTOR, timeout=CALL)
        if description["metric_type"] != METRIC:
            raise MismatchError(
                f"{self._what()} compares by {description['metric_type']}, not by inner product; "
                "choose another name"
            )

    def _what(self) -> str:
        return f"the collection {self._name} in {self._where}"

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn Milvus's errors into one line."""
        if self._client is None:
            raise RunError(f"{self._what()}: the connection was closed")
        try:
            yield
        except self._milvus.MilvusException as error:
            raise RunError(f"{self._what()}: {_line(error)}") from None


def open_index(
    place: Path | str, dim: int, threads: int, collection: str, token: str | None
) -> MilvusVectors:
    """Open a collection in Milvus: see `vector_index.open_vectors`."""
    return MilvusVectors(str(place), collection, dim, token)


def _parts(count: int, size: int) -> Iterator[slice]:
    """Cut 0..count into slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _public(uri: str) -> str:
    """Return the URI without user and password, for messages."""
    scheme, mark, rest = uri.rpartition("://")
    return scheme + mark + rest.rpartition("@")[2] if mark else uri


def _line(error: Any) -> str:
    return " ".join(str(error.message).split())


def _release(uri: str) -> None:
    """Close a Milvus Lite file when nobody here uses it any more: others may open it then."""
    with _lock:
        _lite[uri] -= 1
        if not _lite[uri]:
            extras.load(
                "this index", "milvus", "milvus_lite.server_manager"
            ).server_manager_instance.release_server(uri)


def _held(path: Path) -> bool:
    """Tell whether another process holds the lock of a Milvus Lite file."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
