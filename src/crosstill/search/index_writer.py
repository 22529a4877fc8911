"""Write the generations of an index, each from the one before."""

import errno
import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from crosstill import files
from crosstill.bundle import Bundle
from crosstill.errors import ConfigError
from crosstill.search import (
    builder_memory,
    catalogue,
    index_folder,
    memory_vectors,
    searcher,
    vector_index,
)

log = logging.getLogger(__name__)

LARGE = 20_000  # photos from which on the memory that an index takes is said beforehand
CHUNK = 10_000  # vectors that are held besides the index while it is filled


class IndexWriter:
    """Publishes one generation after another.

    Args:
        index: the folder.
        bundle: that makes the vectors.
        root: where the photos are.
        base: the generation to start from; None starts anew.
        memory: of the builder, which has the vectors of all contents.

    Attributes:
        base: the last generation.
        rows: the files that it holds, by their path.
        numbers: of its photos, by the SHA-256 of their bytes.
        milvus: uri and collection, where the vectors are to live there.
        threads: of one call of the vectors.
        named: the Milvus that the user named in this call, which may see the secret.
        copy: name of the folder that holds the bundle's copy.
    """

    def __init__(
        self,
        index: Path,
        bundle: Bundle,
        root: Path,
        base: index_folder.Pointer | None,
        memory: builder_memory.Memory,
    ) -> None:
        self.index, self.bundle, self.root, self.base, self.memory = (
            index,
            bundle,
            root,
            base,
            memory,
        )
        self.rows: dict[str, catalogue.Row] = {}
        self.numbers: dict[bytes, int] = {}
        self.milvus = base.milvus if base else None
        self.threads = 1
        self.named: str | None = None
        self.copy = index_folder.copy_bundle(index, bundle)
        self._vectors: vector_index.VectorIndex | None = None
        self._kind: index_folder.Kind = "flat"
        if base:
            photos = catalogue.Catalogue(self._catalogue(base))
            self.rows, self.numbers = photos.rows(), photos.numbers()
            photos.close()

    def move_to(self, uri: str, used: str | None) -> None:
        """Keep the vectors in Milvus from the next generation on.

        Args:
            uri: of a cluster, or the path of a Milvus Lite file.
            used: a collection that a reader may have open, and that is left alone.
        """
        place = index_folder.milvus_place(self.index, milvus_uri(uri))
        if self.milvus and index_folder.milvus_place(self.index, self.milvus["uri"]) == place:
            return
        name = self.memory.get("collection")
        if name is None or name == used:
            name = f"crosstill_{uuid.uuid4().hex[:16]}"
            self.memory.put("collection", name)
        if used:
            log.info("the collection %s in Milvus is left to those who still read it", used)
        beside = place.endswith(vector_index.LITE) and Path(place).is_relative_to(self.index.parent)
        kept = os.path.relpath(place, self.index) if beside else place  # both may be moved then
        self.milvus = {"uri": kept, "collection": name}

    def check_space(self, photos: int, unread: int) -> None:
        """Log the memory of a large index, and refuse one that the disk cannot hold.

        Args:
            photos: in the folder.
            unread: about how many of them are new.

        Raises:
            DiskFullError: there is too little room.
        """
        dim, kind = self.bundle.dim, "milvus" if self.milvus else vector_index.kind_for(photos)
        memory = vector_index.estimate_bytes(photos, dim, kind)
        if photos >= LARGE:
            where = "in Milvus" if self.milvus else "of memory"
            memory_text = files.amount(memory)
            log.info("%s photos: the vectors will take about %s %s", photos, memory_text, where)
        vectors = 0 if self.milvus else vector_index.estimate_disk(photos, dim, kind)
        need = unread * (4 * dim + 500) + photos * 300 + vectors
        if need > shutil.disk_usage(self.index).free:
            raise files.disk_full(self.index, errno.ENOSPC, need)

    def restore_vectors(self) -> None:
        """Restore vectors that the memory has lost from the last generation."""
        if self.base and self.base.folder != str(self.root):
            log.warning(
                "%s held the photos of %s, now those of %s",
                self.index,
                self.base.folder,
                self.root,
            )
        lost = [(sha, n) for sha, n in self.numbers.items() if sha not in self.memory.shas]
        if not lost or self.base is None:
            return
        stored = self._base_vectors(self.base)
        ids = set(stored.ids().tolist())
        lost = [(sha, number) for sha, number in lost if number in ids]
        for start in range(0, len(lost), CHUNK):
            shas, numbers = zip(*lost[start : start + CHUNK], strict=True)
            rows = stored.vectors(np.array(numbers))
            self.memory.keep(shas, rows / np.linalg.norm(rows, axis=1, keepdims=True))

    def differs(self, rows: dict[str, catalogue.Row]) -> bool:
        """Tell whether files, folder or place of the vectors differ from the last generation's."""
        if self.base is None or rows != self.rows:
            return True
        return (self.base.folder, self.base.milvus) != (str(self.root), self.milvus)

    def publish(self, rows: dict[str, catalogue.Row]) -> None:
        """Publish a generation of exactly these files; the memory holds all their vectors.

        Raises:
            RunError: the disk is full.
            CorruptError: the work is damaged.
        """
        number = index_folder.next_number(self.index)
        before = self._catalogue(self.base) if self.base else None
        target = index_folder.generation_folder(self.index, number)
        with files.writing(self.index, whole=True), index_folder.written_aside(target) as aside:
            change = catalogue.write(aside / catalogue.NAME, before, rows)
            stored = self._next_vectors(change)
            stored.save(aside)
            digests = index_folder.digest_files(aside)
        self.base = index_folder.Pointer(
            generation=number,
            previous=self.base.generation if self.base else None,
            identity=self.bundle.identity,
            bundle=self.copy,
            dim=self.bundle.dim,
            kind=self._kind,
            folder=str(self.root),
            photos=len(self.numbers),
            files=digests,
            quantiles=searcher.calibrate(self.bundle, stored, self.numbers),
            milvus=self.milvus,
        )
        index_folder.switch(self.index, self.base)
        self.rows = rows

    def sync_milvus(self) -> None:
        """Add to Milvus and remove from it until it holds exactly the published photos."""
        if self.milvus is None or self.base is None:
            return
        stored = self._base_vectors(self.base)
        ids, wanted = set(stored.ids().tolist()), set(self.numbers.values())
        self._add(stored, ((n, sha) for sha, n in self.numbers.items() if n not in ids))
        stored.remove(np.array(sorted(ids - wanted), np.int64))

    def close(self) -> None:
        if self._vectors is not None:
            self._vectors.close()

    def _next_vectors(self, change: catalogue.Change) -> vector_index.VectorIndex:
        """Build the vectors of the next generation; in Milvus, old ones stay until the switch."""
        gone = set(change.removed)
        self.numbers = {sha: n for sha, n in self.numbers.items() if n not in gone}
        self.numbers |= {sha: number for number, sha in change.added}
        kind: index_folder.Kind = (
            "milvus" if self.milvus else vector_index.kind_for(len(self.numbers))
        )
        if self.base and (self.base.kind, self.base.milvus) == (kind, self.milvus):
            stored = self._base_vectors(self.base)
            if not self.milvus:
                stored.remove(np.array(change.removed, np.int64))
            self._add(stored, change.added)
            return stored
        self.close()
        self._vectors, self._kind = self._empty_vectors(kind), kind
        self._add(self._vectors, self._in_order(kind))
        return self._vectors

    def _base_vectors(self, base: index_folder.Pointer) -> vector_index.VectorIndex:
        if self._vectors is None:
            self._vectors = index_folder.open_vectors(self.index, base, self.threads, self.named)
            self._kind = base.kind
        return self._vectors

    def _empty_vectors(self, kind: index_folder.Kind) -> vector_index.VectorIndex:
        if self.milvus is None:
            return memory_vectors.MemoryVectors(self.bundle.dim, kind, self.threads, self.index)
        uri = index_folder.milvus_place(self.index, self.milvus["uri"])
        name = self.milvus["collection"]
        token = index_folder.milvus_token(uri, self.named)
        return vector_index.open_vectors(uri, self.bundle.dim, self.threads, name, token)

    def _in_order(self, kind: str) -> list[tuple[int, bytes]]:
        """List all photos; for codes in random order, since the first ones set their range."""
        every = [(number, sha) for sha, number in self.numbers.items()]
        if kind not in ("codes", "hnsw"):
            return every
        return [every[i] for i in np.random.default_rng(0).permutation(len(every))]

    def _add(self, stored: vector_index.VectorIndex, photos: Iterable[tuple[int, bytes]]) -> None:
        photos = list(photos)
        for start in range(0, len(photos), CHUNK):
            numbers, shas = zip(*photos[start : start + CHUNK], strict=True)
            stored.add(np.array(numbers), self.memory.vectors(shas))

    def _catalogue(self, base: index_folder.Pointer) -> Path:
        return index_folder.generation_folder(self.index, base.generation) / catalogue.NAME


def milvus_uri(uri: str) -> str:
    """Return a URI as it may be stored: absolute, and without a secret.

    Raises:
        ConfigError: it holds a user or a password, or is no Milvus.
    """
    if not vector_index.is_server(uri):
        raise ConfigError(f"--milvus {uri}: no Milvus; give http://host:19530 or a path in *.db")
    if "@" in urlsplit(uri).netloc:
        raise ConfigError("--milvus: holds a password; give it in the variable MILVUS_TOKEN alone")
    return str(Path(uri).absolute()) if uri.endswith(vector_index.LITE) else uri
