"""Run a teacher over a dataset once, in shards that survive a kill.

Which rows a shard holds follows from the sorted image ids alone. A build that was killed goes on
after its last whole shard and ends with the very bytes of a build that was not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstill import files, images, progress
from crosstill.cache import journal, sources, store
from crosstill.cache.journal import Journal
from crosstill.data import Pairs
from crosstill.errors import (
    ConfigError,
    CorruptError,
    DataError,
    ImageError,
    MismatchError,
    ModelError,
)
from crosstill.teachers.base import Teacher
from crosstill.teachers.features import FeaturesTeacher
from crosstill.types import Example

log = logging.getLogger(__name__)

SHARD_ROWS = 2048  # rows in a shard, and so what a kill can cost at most
DTYPES = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the stored rows besides the teacher and the data."""

    views: int = 1  # per image; view 0 is the plain photo
    seed: int = 0  # of the other views
    dtype: str = "fp16"
    batch_size: int = 64  # images or captions in one forward pass of the teacher
    strict: bool = False  # stop at the first unreadable image

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if self.views < 1 or self.batch_size < 1:
            raise ConfigError("views and batch_size must be at least 1")


def build(
    teacher: Teacher | FeaturesTeacher | None, pairs: Pairs, folder: str | Path, **options: Any
) -> store.Cache:
    """Make the cache of `pairs` under `teacher`, or finish it, or find it already there.

    Args:
        teacher: any teacher; None keeps ids, captions and splits but no features, which is
            all that a loss without a teacher needs.
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        options: fields of `Options`.

    Raises:
        MismatchError: the folder holds a cache of another teacher, dataset or setting.
        LockedError: another process is building in the folder.
        ConfigError: an option that cannot be, or a folder that holds something else.
        ImageError: an image is unreadable and `strict` is set.
        DataError: no image is readable.
    """
    try:
        settings = Options(**options)
    except TypeError as error:
        raise ConfigError(f"cache: {error}") from None
    path = files.writable_folder(Path(folder))
    _refuse_foreign(path)
    with files.locked(path):
        files.sweep(path)
        work = _Build(teacher, pairs, path, settings)
        return work.reuse() or work.run()


def _refuse_foreign(folder: Path) -> None:
    """A cache moves into an empty folder or into its own, never among someone's files."""
    names = {path.name for path in folder.iterdir()}
    if names & {store.HEADER, journal.NAME}:
        return
    others = sorted(n for n in names if n != ".lock" and not n.startswith(files.TEMPORARY))
    if others:
        raise ConfigError(f"{folder} holds {others[0]} and no cache; give another --out")


class _Build:
    """One build of one folder, whose lock is held."""

    def __init__(
        self,
        teacher: Teacher | FeaturesTeacher | None,
        pairs: Pairs,
        folder: Path,
        options: Options,
    ) -> None:
        self.teacher, self.pairs, self.folder, self.options = teacher, pairs, folder, options
        ordered = sorted(pairs.examples, key=lambda example: example.image_id)
        self.examples = [replace(e, captions=tuple(sorted(e.captions))) for e in ordered]
        self.about = _describe(teacher)
        self.key = {
            "teacher": self.about["identity"],
            "modalities": self.about["modalities"],
            "data": pairs.digest(),
            "views": options.views,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        self.journal = Journal(folder, self.key, store.FORMAT)

    # --- what is already there ---

    def reuse(self) -> store.Cache | None:
        """The finished cache of the same key, if there is one; its photos may have moved."""
        path = self.folder / store.HEADER
        if not path.is_file():
            return None
        header = files.read_sealed(path, {store.FORMAT})
        self._refuse_other(header["key"], "a cache")
        try:
            cache = store.Cache(self.folder)
        except CorruptError as error:
            raise CorruptError(
                f"{error}: delete {self.folder} and run the same command again"
            ) from None
        if header["data"]["source"] == self.pairs.source:
            return cache
        known = set(cache.image_ids)
        moved = [example for example in self.examples if example.image_id in known]
        header["files"] |= store.write_manifest(self.folder, moved)
        header["data"] = self._data()
        files.write_json(path, files.sealed(header))
        return store.Cache(self.folder)

    def _refuse_other(self, key: dict[str, Any], what: str) -> None:
        different = {name for name in self.key if key.get(name) != self.key[name]}
        if not different:
            return
        words = {"data": "dataset", "modalities": "teacher", "views": "number of views"}
        parts = sorted({words.get(name, name) for name in different})
        raise MismatchError(
            f"{self.folder} holds {what} of another {' and another '.join(parts)}"
            f"{self._changed_identity(key)}; give another --out, or delete that folder"
        )

    def _changed_identity(self, key: dict[str, Any]) -> str:
        mine, theirs = self.key["teacher"], key.get("teacher", {})
        changed = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        return f" (the teacher's {', '.join(changed)} differ)" if changed else ""

    # --- the work ---

    def run(self) -> store.Cache:
        earlier = Journal.read(self.folder, store.FORMAT)
        if earlier:
            self._refuse_other(earlier["key"], "an unfinished cache")
            self.journal.adopt(earlier)
        self.journal.save()
        self._image_shards()
        bad = {row["image_id"] for row in self._unreadable()}
        readable = [example for example in self.examples if example.image_id not in bad]
        if not readable:
            raise DataError(f"{self.pairs.name}: all {len(self.examples)} images are unreadable")
        texts = [text for example in readable for text in example.captions]
        self._text_shards(texts)
        return self._finish(readable, len(texts))

    def _image_shards(self) -> None:
        source = sources.source_for(self.teacher)
        wanted = [(e, view) for e in self.examples for view in range(self.options.views)]
        # all views of an image share a shard
        size = max(1, SHARD_ROWS // self.options.views) * self.options.views
        first = len(self.journal.shards["image"]) * size
        with (
            ThreadPoolExecutor(max_workers=4) as pool,
            progress.bar("images", len(wanted), first) as bar,
        ):
            for start in range(first, len(wanted), size):
                loaded: list[Any] = []
                features: list[Tensor] = []
                chunk = wanted[start : start + size]
                load = self._loader(source)
                for batch in sources.ahead(chunk, self.options.batch_size, pool, load):
                    good = [item for item in batch if isinstance(item, Tensor)]
                    features += [source.embed(torch.stack(good)).cpu()] if good else []
                    loaded += batch
                    bar.advance(len(batch))
                bad = {item["image_id"]: item for item in loaded if isinstance(item, dict)}
                array = self._array(features)
                self.journal.commit("image", array, quarantined=list(bad.values()))

    def _loader(self, source: sources.Pixels) -> Callable[[tuple[Example, int]], Any]:
        def load(row: tuple[Example, int]) -> Tensor | dict[str, Any] | None:
            example, view = row
            size = 0
            try:
                data = self.pairs.read(example)
                size = len(data)
                seen = images.draw_view(example.image_id, view, self.options.seed)
                return source.load(data, example, seen)
            except ImageError as error:
                if self.options.strict:
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

    def _text_shards(self, texts: Sequence[str]) -> None:
        if self.teacher is None or "text" not in self.teacher.modalities:
            return
        first = len(self.journal.shards["text"]) * SHARD_ROWS
        with progress.bar("captions", len(texts), first) as bar:
            for start in range(first, len(texts), SHARD_ROWS):
                features = self._embed_texts(texts[start : start + SHARD_ROWS], bar)
                self.journal.commit("text", self._array([features]))

    def _embed_texts(self, texts: Sequence[str], bar: progress.Bar) -> Tensor:
        """Features of a shard's captions; captions of one length share a pass and its padding."""
        assert self.teacher is not None
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        out = torch.empty(len(texts), self.teacher.dim)
        for start in range(0, len(order), self.options.batch_size):
            rows = order[start : start + self.options.batch_size]
            out[rows] = self.teacher.embed_texts([texts[row] for row in rows]).cpu()
            bar.advance(len(rows))
        return out

    def _array(self, features: Sequence[Tensor]) -> np.ndarray | None:
        if not features:
            return None
        rows = torch.cat(tuple(features))
        # a teacher that yields NaN once would poison every loss later, far from its cause
        if not torch.isfinite(rows).all():
            raise ModelError(f"{self.about['name']}: its features are not finite; check the model")
        return rows.numpy().astype(DTYPES[self.options.dtype])

    def _finish(self, readable: list[Example], texts: int) -> store.Cache:
        quarantine = images.Quarantine()
        for row in [*self.pairs.quarantine.rows, *self._unreadable()]:
            quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
        files.write_atomic(self.folder / store.QUARANTINE, quarantine.write)
        rows = {"image": len(readable) * self.options.views, "text": texts}
        listed = {store.QUARANTINE: files.digest_file(self.folder / store.QUARANTINE)}
        header = {
            "format": store.FORMAT,
            "key": self.key,
            "teacher": self.about,
            "data": self._data(),
            "shards": {kind: self.journal.stored(kind) for kind in self.about["modalities"]},
            "rows": {kind: rows[kind] for kind in self.about["modalities"]},
            "files": store.write_manifest(self.folder, readable) | listed,
            "quarantined": len(quarantine),
        }
        files.write_json(self.folder / store.HEADER, files.sealed(header))
        self.journal.close()
        return store.Cache(self.folder)

    def _data(self) -> dict[str, Any]:
        return {"name": self.pairs.name, "source": self.pairs.source}


def _describe(teacher: Teacher | FeaturesTeacher | None) -> dict[str, Any]:
    if teacher is None:
        return dict.fromkeys(("name", "source", "dim", "licence", "parameters")) | {
            "identity": {},
            "modalities": [],
        }
    return {
        "name": teacher.name,
        "source": teacher.source,
        "parameters": None if isinstance(teacher, FeaturesTeacher) else teacher.parameter_count(),
        "dim": teacher.dim,
        "licence": teacher.licence,
        "identity": teacher.identity(),
        "modalities": sorted(teacher.modalities),
    }
