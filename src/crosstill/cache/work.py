"""What every build of a cache does: find what is there, see which images can be read, finish.

Which rows a shard holds follows from the sorted image ids alone. A build that was killed goes on
after its last whole shard and ends with the very bytes of a build that was not.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from crosstill import decoding, files, images, progress
from crosstill.cache import format, journal, sources
from crosstill.cache.journal import Journal
from crosstill.data import Pairs
from crosstill.errors import ConfigError, CorruptError, DataError, ImageError, MismatchError
from crosstill.teachers.base import TextReader, truncation_note
from crosstill.types import Example

log = logging.getLogger(__name__)

SHARD_ROWS = 2048  # rows in a shard, and so what a kill can cost at most
Opened = TypeVar("Opened", bound=format.CacheBase)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read."""

    views: int = 1  # per image; view 0 is the plain photo
    augment: tuple[str, ...] = images.AUGMENTATIONS  # what makes the other views
    seed: int = 0  # of the other views, and of whatever else is drawn
    batch_size: int = 64  # images or captions in one forward pass of the teacher
    strict: bool = False  # stop at the first unreadable image
    teacher_licence: str | None = None  # where the teacher's card does not say


def tell_truncated(teacher: TextReader, name: str, texts: Sequence[str]) -> None:
    """Warn of captions that the teacher cuts: it never sees their ends."""
    if note := truncation_note({name: teacher}, texts):
        log.warning(note)


class Work(ABC, Generic[Opened]):
    """One build of one folder.

    Args:
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        about: the teacher as the header describes it.
        key: all that decides what is stored.
        reading: how images are read.
    """

    opened: ClassVar[type[format.CacheBase]]
    kinds: ClassVar[tuple[str, ...]]  # of the shards; "image" is the first
    words: ClassVar[Mapping[str, str]]  # what the parts of the key are called

    def __init__(
        self,
        pairs: Pairs,
        folder: str | Path,
        about: dict[str, Any],
        key: dict[str, Any],
        reading: Reading,
    ) -> None:
        self.folder = files.writable_folder(Path(folder))
        self.pairs, self.key, self.reading = pairs, key, reading
        self.about = about | ({"licence": given} if (given := reading.teacher_licence) else {})
        ordered = sorted(pairs.examples, key=lambda example: example.image_id)
        self.examples = [replace(e, captions=tuple(sorted(e.captions))) for e in ordered]
        self.journal = Journal(self.folder, key, self.opened.version, self.kinds)

    def make(self) -> Opened:
        """Make the cache, or finish it, or find it already there."""
        self._refuse_foreign()
        with files.locked(self.folder):
            files.sweep(self.folder)
            return self._reuse() or self._run()

    # --- what is already there ---

    def _refuse_foreign(self) -> None:
        """A cache moves into an empty folder or into its own, never among someone's files."""
        names = {path.name for path in self.folder.iterdir()}
        if names & {self.opened.file, journal.NAME}:
            return
        others = sorted(n for n in names if n != ".lock" and not n.startswith(files.TEMPORARY))
        if others:
            other = format.kind_of(self.folder)
            contents = other.noun if other else f"{others[0]} and no cache"
            raise ConfigError(f"{self.folder} holds {contents}; give another --out")

    def _reuse(self) -> Opened | None:
        """The finished cache of the same key, if there is one.

        Its photos may have moved, and licences may be given later.
        """
        path = self.folder / self.opened.file
        if not path.is_file():
            return None
        header = files.read_sealed(path, {self.opened.version})
        self._refuse_other(header["key"], self.opened.noun)
        try:
            cache = self._open()
        except CorruptError as error:
            raise CorruptError(
                f"{error}: delete {self.folder} and run the same command again"
            ) from None
        data, teacher = header["data"] | self._data(), header["teacher"]
        if self.reading.teacher_licence:
            teacher = teacher | {"licence": self.reading.teacher_licence}
        known = set(cache.image_ids)
        moved = [example for example in self.examples if example.image_id in known]
        as_it_was = (data, teacher) == (header["data"], header["teacher"])
        if as_it_was and [example.path for example in moved] == cache.paths:
            return cache
        header["files"] |= format.write_tables(self.folder, moved)
        header |= {"data": data, "teacher": teacher}
        files.write_json(path, files.sealed(header))
        return self._open()

    def _open(self) -> Opened:
        cache: Any = self.opened(self.folder)
        return cache

    def _refuse_other(self, key: dict[str, Any], what: str) -> None:
        # what views are made of is only said where there are several
        if (key.keys() ^ self.key.keys()) - {"augment"}:
            raise MismatchError(
                f"{self.folder} holds {what} of another kind; give another --out, "
                "or delete that folder"
            )
        different = {name for name in {*self.key, *key} if key.get(name) != self.key.get(name)}
        if not different:
            return
        parts = sorted({self.words.get(name, name) for name in different})
        raise MismatchError(
            f"{self.folder} holds {what} of another {' and another '.join(parts)}"
            f"{self._changed_identity(key)}; give another --out, or delete that folder"
        )

    def _changed_identity(self, key: dict[str, Any]) -> str:
        mine, theirs = self.key["teacher"], key["teacher"]
        changed = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        return f" (the teacher's {', '.join(changed)} differ)" if changed else ""

    # --- the work ---

    @abstractmethod
    def _source(self) -> sources.Pixels:
        """Where the image rows come from."""

    @abstractmethod
    def _fill(self, readable: list[Example]) -> dict[str, Any]:
        """Make all shards that are left; return what the header says besides the common parts."""

    def _array(self, features: list[Tensor]) -> np.ndarray | None:
        """A shard of image rows as it is stored; None where there are none."""
        return None

    def _run(self) -> Opened:
        earlier = Journal.read(self.folder, self.opened.version)
        if earlier:
            self._refuse_other(earlier["key"], "an unfinished cache")
            self.journal.adopt(earlier)
        self.journal.save()
        self._image_shards()
        bad = {row["image_id"] for row in self._unreadable()}
        readable = [example for example in self.examples if example.image_id not in bad]
        if not readable:
            raise DataError(f"{self.pairs.name}: all {len(self.examples)} images are unreadable")
        return self._finish(readable, self._fill(readable))

    def _image_shards(self) -> None:
        source = self._source()
        load = self._loader(source)
        wanted = [(e, view) for e in self.examples for view in range(self.reading.views)]
        # all views of an image share a shard
        size = max(1, SHARD_ROWS // self.reading.views) * self.reading.views
        first = len(self.journal.shards["image"]) * size
        with (
            decoding.in_threads() as pool,
            progress.bar("images", len(wanted), first) as bar,
        ):
            for start in range(first, len(wanted), size):
                bad: dict[str, dict[str, Any]] = {}
                features: list[Tensor] = []
                chunk = wanted[start : start + size]
                for batch in sources.ahead(chunk, self.reading.batch_size, pool, load):
                    good = [item for item in batch if isinstance(item, Tensor)]
                    features += [source.embed(torch.stack(good)).cpu()] if good else []
                    bad |= {item["image_id"]: item for item in batch if isinstance(item, dict)}
                    bar.advance(len(batch))
                self.journal.commit("image", self._array(features), quarantined=list(bad.values()))

    def _loader(
        self, source: sources.Pixels
    ) -> Callable[[tuple[Example, int]], Tensor | dict[str, Any] | None]:
        def load(row: tuple[Example, int]) -> Tensor | dict[str, Any] | None:
            example, view = row
            size = 0
            try:
                data = self.pairs.read(example)
                size = len(data)
                drawn = (example.image_id, view, self.reading.seed, self.reading.augment)
                return source.load(data, example, images.draw_view(*drawn))
            except ImageError as error:
                if self.reading.strict:
                    raise
                return {
                    "image_id": example.image_id,
                    "path": example.path,
                    "reason": error.reason,
                    "bytes": size,
                }

        return load

    def _unreadable(self) -> list[dict[str, Any]]:
        return [row for shard in self.journal.shards["image"] for row in shard["quarantined"]]

    def _finish(self, readable: list[Example], more: dict[str, Any]) -> Opened:
        quarantine = images.Quarantine()
        for row in [*self.pairs.quarantine.rows, *self._unreadable()]:
            quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
        files.write_atomic(self.folder / format.QUARANTINE, quarantine.write)
        listed = {format.QUARANTINE: files.digest_file(self.folder / format.QUARANTINE)}
        common = {
            "format": self.opened.version,
            "key": self.key,
            "teacher": self.about,
            "data": self._data(),
            "files": format.write_tables(self.folder, readable) | listed | more.pop("files", {}),
            "quarantined": len(quarantine),
        }
        files.write_json(self.folder / self.opened.file, files.sealed(common | more))
        self.journal.close()
        return self._open()

    def _data(self) -> dict[str, Any]:
        licence = {"licence": self.pairs.licence} if self.pairs.licence else {}
        return {"name": self.pairs.name, "source": self.pairs.source, **licence}
