"""Bring an index up to date with a folder of photos: read what changed, encode what is new.

    walk → what may have changed → read and decode (threads) → encode → publish

A file whose size and times are as they were is not read, one whose bytes are known is not encoded.
What was encoded is remembered at once (see `builder_memory`), so that a killed build loses a batch
at most.
"""

import json
import logging
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosstill import errors, files, progress
from crosstill.bundle import Bundle, Encoder, check_same
from crosstill.pixels import quarantine_row
from crosstill.search import builder_memory, index_folder, index_writer, scan, vector_index
from crosstill.search.catalogue import Row

log = logging.getLogger(__name__)

BATCH = 32  # photos that are encoded and remembered at a time
QUEUE = 8  # such batches that may wait for the encoder: enough work while one is published
QUARANTINE = "quarantine.jsonl"  # lists the files that are not in the index, and why
FIRST = 1000  # new photos after which a growing index is published for the first time


class _Options(NamedTuple):
    """Options of `build`."""

    workers: int | None
    threads: int
    milvus: str | None  # as the user wrote it
    named: str | None  # the same, absolute and without a secret
    strict: bool
    rebuild: bool


@dataclass(frozen=True)
class Built:
    """The outcome of one build.

    Attributes:
        generation: the one that counts now.
        photos: how many it holds.
        new, unchanged, changed, moved, deleted: files, compared with the generation before.
        unreadable: files left out, listed in `quarantine.jsonl`.
        encoded: photos that went through the encoder.
        seconds: that it took.
    """

    generation: int
    photos: int
    new: int
    unchanged: int
    changed: int
    moved: int
    deleted: int
    unreadable: int
    encoded: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build(  # noqa: PLR0913  # its options are its arguments
    bundle_folder: str | Path,
    photos_folder: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    milvus: str | None = None,
    strict: bool = False,
    rebuild: bool = False,
) -> Built:
    """Index a folder of photos, or bring its index up to date.

    Args:
        bundle_folder: the exported student.
        photos_folder: searched with all that is below it.
        out: the index.
        workers: threads that read and decode; None means one for each core, 2 to 8.
        threads: that the encoder, and FAISS, may use.
        milvus: where the vectors are to live, if not in the index; a URI, or a path in *.db.
        strict: stop at the first file that cannot be used.
        rebuild: start from nothing, with whatever bundle; the old generation serves meanwhile.

    Raises:
        ModelError: no bundle, or half a one.
        DataError: no photo in the folder, or none that can be read.
        MismatchError: the index belongs to another bundle; `rebuild` was not asked for.
        ConfigError: an option that cannot be, or a folder that holds something else.
        LockedError: another process is building the index.
        ImageError: a file cannot be read and `strict` is set.
        RunError: the disk is full, or Milvus failed.
    """
    for name, threads_wanted in (("workers", workers), ("threads", threads)):
        if threads_wanted is not None and threads_wanted < 1:
            raise errors.ConfigError(f"--{name} {threads_wanted}: give 1 or more")
    named = None if milvus is None else index_writer.milvus_uri(milvus)
    options = _Options(workers, threads, milvus, named, strict, rebuild)
    bundle = Bundle.open(Path(bundle_folder))
    root = Path(photos_folder).resolve()
    if not root.is_dir():
        raise errors.DataError(f"{photos_folder}: no such folder; give a folder of photos")
    index = _place(Path(out))
    begun = (index / index_folder.MEMORY).is_file()
    with files.locked(index):
        try:
            return _Build(bundle, root, index, options).run()
        except errors.DataError:
            if not begun and not (index / QUARANTINE).is_file():
                shutil.rmtree(index)  # there were no photos: nothing was begun
            raise
        except OSError as error:
            where, why = error.filename or index, error.strerror or error
            raise errors.RunError(
                f"{where}: {why}; mend that, then run the same command again"
            ) from None


class _Build:
    """One build of an index."""

    def __init__(self, bundle: Bundle, root: Path, index: Path, options: _Options) -> None:
        self.bundle, self.root, self.index, self.options = bundle, root, index, options
        self.began, self.encoded, self.due = time.monotonic(), 0, FIRST
        self.taken: set[bytes] = set()  # contents that this run has encoded, or is encoding
        pointer = self._pointer()
        used = pointer.milvus if pointer and pointer.milvus else {}
        uri = options.milvus or (used and index_folder.milvus_place(index, used["uri"]))
        if uri and uri.endswith(vector_index.LITE) and not Path(uri).absolute().parent.is_dir():
            raise errors.ConfigError(
                f"{uri}: no such folder for vectors; make it, or name another place with "
                "--milvus NEW.db"
            )
        index_folder.clean(index, pointer)
        base = self._sound(pointer)
        # While an index is remade from nothing, the old one is worth more than a part of the new.
        self.gradual = pointer is None or base is not None
        after = f" after {pointer.generation}" if pointer and options.rebuild else ""
        self.memory = builder_memory.Memory(
            index / index_folder.MEMORY, bundle.fingerprint + after, root
        )
        self.writer = index_writer.IndexWriter(index, bundle, root, base, self.memory)
        self.writer.threads = options.threads
        self.writer.named = options.named
        if uri:
            self.writer.move_to(uri, used.get("collection"))

    @cached_property
    def encoder(self) -> Encoder:
        """Load the encoder when the first photo is to be encoded: most builds find none."""
        return Encoder(self.bundle, self.options.threads)

    def run(self) -> Built:
        try:
            return self._run()
        finally:
            self.writer.close()
            self.memory.close()

    def _run(self) -> Built:
        before = self.writer.rows
        self.writer.restore_vectors()
        tree = scan.walk(self.root, skip=self.index)
        if not tree.photos:
            raise scan.no_photos(self.root, tree)
        self._encode(tree)
        rows = self._rows(tree) | _under(before, tree.closed)
        unreadable = self._write_quarantine(tree)
        if not rows:
            where = self.index / QUARANTINE
            raise errors.DataError(f"{self.root}: none of its photos can be read; {where} says why")
        if self.writer.differs(rows):
            self.writer.publish(rows)
        self.writer.sync_milvus()
        self._warn_of_emptied(tree, before, rows)
        self._tidy(tree, rows)
        return self._report(before, rows, unreadable)

    # --- what is there ---

    def _pointer(self) -> index_folder.Pointer | None:
        if not (self.index / index_folder.POINTER).is_file():
            return None
        try:
            pointer = index_folder.read_pointer(self.index)
        except errors.CorruptError as error:
            log.warning("%s; now it is made anew", str(error).partition(";")[0])
            return None
        if not self.options.rebuild:
            what = f"{self.index} is the index of another bundle than {self.bundle.folder}"
            try:
                check_same(pointer.identity, self.bundle.identity, what)
            except errors.MismatchError as error:
                raise errors.MismatchError(f"{error} with --rebuild") from None
        return pointer

    def _sound(self, pointer: index_folder.Pointer | None) -> index_folder.Pointer | None:
        """Return the generation to start from, None where there is none or it must not be used."""
        if pointer is None or self.options.rebuild:
            return None
        try:
            index_folder.check_generation(self.index, pointer)
        except errors.CorruptError as error:
            log.warning("%s; now it is made anew", str(error).partition(";")[0])
            return None
        return pointer

    # --- the work ---

    def _encode(self, tree: scan.Scan) -> None:
        """Read the files that may have changed, and encode the contents that are new."""
        todo = {name: s for name, s in tree.photos.items() if not self._settled(name, s)}
        if todo:
            new = max(0, len(tree.photos) - len(self.memory.shas))  # the others have only moved
            self.writer.check_space(len(tree.photos), min(len(todo), new))
        known = self.memory.known.values()
        refused = {k.sha: k.reason for k in known if k.sha is not None and k.reason}
        reader = scan.Reader(self.root, self.bundle.preprocess, self.memory.shas, refused)
        workers = self.options.workers or max(2, min(8, len(os.sched_getaffinity(0))))
        waiting: deque[tuple[list[bytes], Future[np.ndarray]]] = deque()
        # A thread of its own, so that the encoder never waits for the disk or for a publication.
        pool = ThreadPoolExecutor(1)
        try:
            with progress.bar("photos", len(todo)) as bar:
                for reads in scan.grouped(scan.ahead(reader.read, todo, workers), BATCH):
                    if fresh := self._note(reads):
                        images = np.stack(list(fresh.values()))
                        vectors = pool.submit(self.encoder.encode_images, images)
                        waiting.append((list(fresh), vectors))
                    if len(waiting) > QUEUE:
                        self._keep(*waiting.popleft())
                        self._publish_some(tree)
                    bar.advance(len(reads))
                for shas, vectors in waiting:
                    self._keep(shas, vectors)
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C waits for one batch, not for all
        self.memory.commit()

    def _settled(self, name: str, stamp: scan.Stamp) -> bool:
        """Tell whether a file need not be read."""
        known = self.memory.known.get(name)
        if known is None or known.sha is None or not known.still(stamp):
            return False
        return not self.options.strict if known.reason else known.sha in self.memory.shas

    def _note(self, reads: list[scan.Read]) -> dict[bytes, np.ndarray]:
        """Remember read files; return the pixels of new contents by SHA-256."""
        fresh = {}
        for read in reads:
            if self.options.strict and read.known.reason:
                raise errors.ImageError(read.name, read.known.reason)
            self.memory.note(read.name, read.known)
            sha = read.known.sha
            if read.pixels is not None and sha is not None and sha not in self.taken:
                fresh[sha] = read.pixels
        self.taken.update(fresh)
        return fresh

    def _keep(self, shas: list[bytes], future: Future[np.ndarray]) -> None:
        rows = future.result()
        if not np.isfinite(rows).all():
            raise errors.ModelError(
                f"{self.bundle.folder}: its vectors are not finite; export it anew"
            )
        self.memory.keep(shas, rows)
        self.encoded += len(shas)

    def _publish_some(self, tree: scan.Scan) -> None:
        """Publish some of a long build: all that was published, and the photos that are new since.

        What has changed, moved or gone waits for the end: halfway through, a photo that moved
        would be missing.
        """
        if self.gradual and self.encoded >= self.due:
            self.due = 2 * self.encoded
            self.writer.publish(self._rows(tree) | self.writer.rows)

    def _rows(self, tree: scan.Scan) -> dict[str, Row]:
        """Return the files whose present content is known and has a vector."""
        rows = {}
        for name, stamp in tree.photos.items():
            known = self.memory.known.get(name)
            if known is None or known.sha is None or known.reason or known.stamp != stamp:
                continue
            if known.sha in self.memory.shas:
                rows[name] = Row(known.sha, stamp.size, stamp.mtime_ns, known.caption)
        return rows

    def _write_quarantine(self, tree: scan.Scan) -> int:
        """List the files that were left out, and why; return how many."""
        bad = [
            quarantine_row(path, why, tree.sizes.get(path, 0))
            for path, why in tree.problems.items()
        ]
        for name, stamp in tree.photos.items():
            if reason := self.memory.known[name].reason:
                bad.append(quarantine_row(name, reason, stamp.size))
        data = "".join(json.dumps(row) + "\n" for row in bad).encode()
        path = self.index / QUARANTINE
        if not path.is_file() or path.read_bytes() != data:
            files.write_bytes(path, data)
        return len(bad)

    def _tidy(self, tree: scan.Scan, rows: Mapping[str, Row]) -> None:
        """Forget files that are gone; turn the memory of a rebuild into an ordinary one."""
        kept = tree.photos.keys() | _under(self.memory.known, tree.closed).keys()
        used = {row.sha for row in rows.values()}
        self.memory.forget(self.memory.known.keys() - kept, self.memory.shas - used)
        if self.memory.get("key") != self.bundle.fingerprint:
            self.memory.put("key", self.bundle.fingerprint)

    # --- what is said of it ---

    def _warn_of_emptied(
        self, tree: scan.Scan, before: Mapping[str, Row], rows: Mapping[str, Row]
    ) -> None:
        """Warn of folders that have lost all of their photos: a disk may not be mounted."""
        shas = {row.sha for row in rows.values()}
        gone = [path for path, row in before.items() if path not in rows and row.sha not in shas]
        for folder, count in scan.count_emptied(gone, tree.photos).items():
            if count > 1 and (self.root / folder).is_dir():
                log.warning(
                    "%s: all %d photos in it are gone; if a disk is not mounted, mount it and run "
                    "the same command again: their vectors are kept for %d days",
                    errors.printable(str(self.root / folder)),
                    count,
                    builder_memory.KEPT_DAYS,
                )

    def _report(self, before: Mapping[str, Row], rows: Mapping[str, Row], unreadable: int) -> Built:
        same = before.keys() & rows.keys()
        unchanged = sum(before[name].sha == rows[name].sha for name in same)
        gone = Counter(before[name].sha for name in before.keys() - rows.keys())
        come = Counter(rows[name].sha for name in rows.keys() - before.keys())
        moved = (gone & come).total()
        base = self.writer.base
        return Built(
            generation=base.generation if base else 0,
            photos=base.photos if base else 0,
            new=come.total() - moved,
            unchanged=unchanged,
            changed=len(same) - unchanged,
            moved=moved,
            deleted=gone.total() - moved,
            unreadable=unreadable,
            encoded=self.encoded,
            seconds=round(time.monotonic() - self.began, 3),
        )


def _place(out: Path) -> Path:
    """Make the folder of an index; refuse one that holds something else."""
    index = files.writable_folder(out).resolve()
    names = {path.name for path in index.iterdir() if not path.name.startswith(".")}
    if names and not names & {index_folder.POINTER, index_folder.MEMORY}:
        raise errors.ConfigError(f"{out} holds {min(names)} and no index; give another --out")
    return index


def _under(files_by_path: Mapping[str, Any], folders: Sequence[str]) -> dict[str, Any]:
    """Select the files that lie below one of the folders."""
    starts = tuple(f"{folder}/" for folder in folders)
    return {path: row for path, row in files_by_path.items() if path.startswith(starts)}
