"""Build a cache of any kind, in shards that survive a kill: what is there, images, shards, header.

Which rows a shard holds follows from the sorted image ids alone. A shard is written first and named
in the journal second, each atomically: a kill at any moment costs the shard in hand and nothing
else, and a build that goes on ends with the very bytes of a build that was never killed.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from crosstill import artefacts, decoding, files, images, progress
from crosstill.cache import format
from crosstill.data import Pairs
from crosstill.errors import ConfigError, CorruptError, DataError, ImageError, MismatchError
from crosstill.teachers.base import TextReader, truncation_note
from crosstill.types import Example

log = logging.getLogger(__name__)

SHARD_ROWS = 2048  # rows in a shard, and so what a kill can cost at most
JOURNAL = "building.json"
Opened = TypeVar("Opened", bound=format.CacheBase)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Hold the settings by which a build reads the images of a dataset."""

    views: int = 1  # per image; view 0 is the plain photo
    augment: tuple[str, ...] = images.AUGMENTATIONS  # what makes the other views
    seed: int = 0  # of the other views, and of whatever else is drawn
    batch_size: int = 64  # images or captions in one forward pass of the teacher
    strict: bool = False  # stop at the first unreadable image
    teacher_licence: str | None = None  # where the teacher's card does not say


class ImageSource:
    """Check that images can be read, and brought to a model's size; give no rows of them.

    Args:
        preprocess: of the model; None only decodes.
    """

    def __init__(self, preprocess: images.Preprocess | None = None) -> None:
        self._preprocess = preprocess

    def load(self, file: bytes, example: Example, view: images.View | None) -> Tensor | None:
        """Load one image as `embed` takes it; None where there is nothing to embed."""
        if self._preprocess is None:
            images.decode(file, example.path)
        else:
            images.load(file, example.path, self._preprocess, view)
        return None

    def embed(self, loaded: Tensor) -> Tensor:
        """Make rows (B, D) of B loaded images."""
        raise NotImplementedError


class CacheBuilder(ABC, Generic[Opened]):
    """Build one cache: find what is there, see which images can be read, make shards, finish.

    Args:
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        teacher: the teacher as the header describes it.
        key: everything that decides what is stored.
        reading: how images are read.

    Attributes:
        opens: the class that opens the finished cache.
        kinds: of the shards; "image" is the first.
        key_names: what the parts of the key are called in messages.
    """

    opens: ClassVar[type[format.CacheBase]]
    kinds: ClassVar[tuple[str, ...]]
    key_names: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        pairs: Pairs,
        folder: str | Path,
        teacher: dict[str, Any],
        key: dict[str, Any],
        reading: ReadOptions,
    ) -> None:
        self.folder = files.writable_folder(Path(folder))
        self.pairs, self.key, self.reading = pairs, key, reading
        licence = {"licence": reading.teacher_licence} if reading.teacher_licence else {}
        self.description = teacher | licence
        ordered = sorted(pairs.examples, key=lambda example: example.image_id)
        self.examples = [replace(e, captions=tuple(sorted(e.captions))) for e in ordered]
        self.journal = Journal(self.folder, key, self.opens.version, self.kinds)

    def make(self) -> Opened:
        """Make the cache, or finish it, or find it already there."""
        self._refuse_foreign()
        with files.locked(self.folder):
            files.sweep(self.folder)
            return self._reuse() or self._run()

    # --- what is already there ---

    def _refuse_foreign(self) -> None:
        """Refuse a folder that is neither empty nor a cache of this kind."""
        names = {path.name for path in self.folder.iterdir()}
        if names & {self.opens.file, JOURNAL}:
            return
        others = sorted(n for n in names if n != ".lock" and not n.startswith(files.TEMPORARY))
        if others:
            other = format.kind_of(self.folder)
            contents = other.noun if other else f"{others[0]} and no cache"
            raise ConfigError(f"{self.folder} holds {contents}; give another --out")

    def _reuse(self) -> Opened | None:
        """Open the finished cache of the same key, if there is one.

        Where photos have moved, or a licence is given now, the header is brought up to date.
        """
        path = self.folder / self.opens.file
        if not path.is_file():
            return None
        header = files.read_sealed(path, {self.opens.version})
        self._refuse_other(header["key"], self.opens.noun)
        try:
            cache = self._open()
        except CorruptError as error:
            raise CorruptError(
                f"{error}: delete {self.folder} and run the same command again"
            ) from None
        data, teacher = header["data"] | self._data(), header["teacher"]
        if self.reading.teacher_licence:
            teacher = teacher | {"licence": self.reading.teacher_licence}
        image_ids = set(cache.image_ids)
        readable = [example for example in self.examples if example.image_id in image_ids]
        unchanged = (data, teacher) == (header["data"], header["teacher"])
        if unchanged and [example.path for example in readable] == cache.paths:
            return cache
        header["files"] |= format.write_tables(self.folder, readable)
        header |= {"data": data, "teacher": teacher}
        files.write_json(path, files.sealed(header))
        return self._open()

    def _open(self) -> Opened:
        cache: Any = self.opens(self.folder)
        return cache

    def _refuse_other(self, key: dict[str, Any], noun: str) -> None:
        # in the key only where there are several views, raw rows, or loose texts
        if (key.keys() ^ self.key.keys()) - {"augment", "raw", "texts"}:
            raise MismatchError(
                f"{self.folder} holds {noun} of another kind; give another --out, "
                "or delete that folder"
            )
        different = {name for name in {*self.key, *key} if key.get(name) != self.key.get(name)}
        if not different:
            return
        parts = sorted({self.key_names.get(name, name) for name in different})
        new, old = self.key["teacher"], key["teacher"]
        changed = [name for name in sorted({*new, *old}) if new.get(name) != old.get(name)]
        detail = f" (the teacher's {', '.join(changed)} differ)" if changed else ""
        raise MismatchError(
            f"{self.folder} holds {noun} of another {' and another '.join(parts)}{detail}; "
            "give another --out, or delete that folder"
        )

    # --- the work ---

    def _source(self) -> ImageSource:
        """Return what makes rows of images."""
        return ImageSource()

    @abstractmethod
    def _fill(self, readable: list[Example]) -> dict[str, Any]:
        """Make all shards that are left; return what the header has besides the common parts."""

    def _array(self, features: list[Tensor]) -> np.ndarray | None:
        """Make a shard of image rows as it is stored; None where there are no rows."""
        return None

    def _run(self) -> Opened:
        earlier = Journal.read(self.folder, self.opens.version)
        if earlier:
            self._refuse_other(earlier["key"], "an unfinished cache")
            self.journal.adopt(earlier)
        self.journal.save()
        self._image_shards()
        unreadable = {row["image_id"] for row in self._unreadable()}
        readable = [example for example in self.examples if example.image_id not in unreadable]
        if not readable:
            raise DataError(f"{self.pairs.name}: all {len(self.examples)} images are unreadable")
        return self._finish(readable, self._fill(readable))

    def _image_shards(self) -> None:
        source, reading = self._source(), self.reading
        rows = [(example, view) for example in self.examples for view in range(reading.views)]
        # all views of an image share a shard
        size = max(1, SHARD_ROWS // reading.views) * reading.views
        first = len(self.journal.shards["image"]) * size

        def load(row: tuple[Example, int]) -> Tensor | images.Unreadable | None:
            example, number = row
            view = images.draw_view(example.image_id, number, reading.seed, reading.augment)
            return images.try_load(
                self.pairs.read, example, lambda file: source.load(file, example, view)
            )

        with progress.bar("images", len(rows), first) as bar:
            for start in range(first, len(rows), size):
                unreadable: dict[str, dict[str, Any]] = {}
                features: list[Tensor] = []
                shard = rows[start : start + size]
                for batch in decoding.batches(load, shard, reading.batch_size):
                    loaded = [image for _, image in batch if isinstance(image, Tensor)]
                    features += [source.embed(torch.stack(loaded)).cpu()] if loaded else []
                    for (example, _), image in batch:
                        if isinstance(image, images.Unreadable):
                            unreadable[example.image_id] = self._set_apart(example, image)
                    bar.advance(len(batch))
                array = self._array(features)
                self.journal.commit("image", array, quarantined=list(unreadable.values()))

    def _set_apart(self, example: Example, image: images.Unreadable) -> dict[str, Any]:
        if self.reading.strict:
            raise image.error
        return {
            "image_id": example.image_id,
            "path": example.path,
            "reason": image.error.reason,
            "bytes": image.size,
        }

    def _unreadable(self) -> list[dict[str, Any]]:
        return [row for shard in self.journal.shards["image"] for row in shard["quarantined"]]

    def _finish(self, readable: list[Example], more: dict[str, Any]) -> Opened:
        quarantine = images.Quarantine()
        for row in [*self.pairs.quarantine.rows, *self._unreadable()]:
            quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
        files.write_atomic(self.folder / format.QUARANTINE, quarantine.write)
        digests = format.write_tables(self.folder, readable)
        digests |= artefacts.digests(self.folder, [format.QUARANTINE])
        common = {
            "format": self.opens.version,
            "key": self.key,
            "teacher": self.description,
            "data": self._data(),
            "files": digests | more.pop("files", {}),
            "quarantined": len(quarantine),
        }
        files.write_json(self.folder / self.opens.file, files.sealed(common | more))
        self.journal.close()
        return self._open()

    def _data(self) -> dict[str, Any]:
        licence = {"licence": self.pairs.licence} if self.pairs.licence else {}
        return {"name": self.pairs.name, "source": self.pairs.source, **licence}


class Journal:
    """The shards that an unfinished build has safely on disk: by kind, in order, a record each.

    A record holds `file` (None for a shard without rows), `rows`, `sha256` and whatever else
    `commit` was given.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], version: int, kinds: Iterable[str]
    ) -> None:
        self._folder = folder
        self._head = {"format": version, "key": dict(key)}
        self.shards: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}

    @staticmethod
    def read(folder: Path, version: int) -> dict[str, Any] | None:
        """Read the journal of an earlier build; None if there is none or it is damaged."""
        if not (folder / JOURNAL).is_file():
            return None
        try:
            return files.read_sealed(folder / JOURNAL, {version})
        except CorruptError as error:
            log.warning("%s; starting this cache over", error)
            return None

    def adopt(self, earlier: Mapping[str, Any]) -> None:
        """Take over the leading shards of an earlier build whose bytes are as it recorded."""
        for kind, shards in self.shards.items():
            shards.extend(self._whole(earlier[kind]))

    def commit(
        self, kind: str, array: np.ndarray | None, name: str | None = None, **record: Any
    ) -> None:
        """Put one more shard on disk; `array` is None when it has no rows."""
        shards = self.shards[kind]
        entry: dict[str, Any] = {"file": None, "rows": 0, **record}
        if array is not None:
            path = self._folder / (name or f"{kind}-{len(shards):05d}.npy")
            files.write_atomic(path, partial(files.save_array, array=array), array.nbytes)
            entry |= {"file": path.name, "rows": len(array), "sha256": files.digest_file(path)}
        shards.append(entry)
        self.save()

    def save(self) -> None:
        """Put the journal itself on disk; its presence also says that the folder is a cache's."""
        files.write_json(self._folder / JOURNAL, files.sealed({**self._head, **self.shards}))

    def stored(self, kind: str) -> list[dict[str, Any]]:
        """List the shards that have rows, as the finished header names them."""
        keep = ("file", "rows", "sha256")
        return [{k: shard[k] for k in keep} for shard in self.shards[kind] if shard["file"]]

    def close(self) -> None:
        (self._folder / JOURNAL).unlink(missing_ok=True)

    def _whole(self, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for position, shard in enumerate(shards):
            try:
                if shard["file"]:
                    artefacts.check_files(self._folder, {shard["file"]: shard["sha256"]})
            except CorruptError as error:
                log.warning("%s; computing it again", error)
                return shards[:position]
        return shards


def tell_truncated(teacher: TextReader, name: str, texts: Sequence[str]) -> None:
    """Warn of captions that the teacher cuts: it never sees their ends."""
    if note := truncation_note({name: teacher}, texts):
        log.warning(note)
