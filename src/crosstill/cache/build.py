"""Run a teacher over a dataset once and keep its features, in shards that survive a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from crosstill import files, images, progress
from crosstill.cache import format, sources, work
from crosstill.data import Pairs
from crosstill.errors import ConfigError, ModelError, unknown
from crosstill.fusion.matcher import FusionTeacher
from crosstill.teachers.base import Teacher
from crosstill.teachers.features import FeaturesTeacher
from crosstill.types import Example

_SCALES = ("logit_scale", "logit_bias")  # of a dual encoder's own training, where it has them
DTYPES = {"fp16": np.float16, "fp32": np.float32}


@dataclass(frozen=True, kw_only=True)
class Options(work.Reading):
    """What decides the stored rows besides the teacher and the data."""

    dtype: str = "fp16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if self.views < 1 or self.batch_size < 1:
            raise ConfigError("views and batch_size must be at least 1")
        for name in (name for name in self.augment if name not in images.AUGMENTATIONS):
            raise unknown("augmentation", name, images.AUGMENTATIONS)
        if self.views > 1 and not self.augment:
            raise ConfigError("augment is empty, so every view would be the photo; name some")


def build(
    teacher: Teacher | FeaturesTeacher | None, pairs: Pairs, folder: str | Path, **options: Any
) -> format.Cache:
    """Make the cache of `pairs` under `teacher`, or finish it, or find it already there.

    Args:
        teacher: any teacher of features; None keeps ids, captions and splits but no features,
            which is all that a loss without a teacher needs.
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        options: fields of `Options`.

    Raises:
        MismatchError: the folder holds a cache of another teacher, dataset or setting.
        LockedError: another process is building in the folder.
        ConfigError: an option that cannot be, or a folder that holds something else.
        ModelError: the teacher gives scores, or no image features, or its vectors are those of
            other images.
        ImageError: an image is unreadable and `strict` is set.
        DataError: no image is readable.
    """
    try:
        settings = Options(**options)
    except TypeError as error:
        raise ConfigError(f"cache: {error}") from None
    if isinstance(teacher, FusionTeacher):
        raise ModelError(
            f"{teacher.name}: a fusion model scores pairs and has no features; make a score cache"
        )
    if isinstance(teacher, FeaturesTeacher):
        teacher.refuse_unknown([example.path for example in pairs.examples])
    return _Build(teacher, pairs, folder, settings).make()


class _Build(work.Work[format.Cache]):
    """One build of a feature cache."""

    opened = format.Cache
    kinds = ("image", "text")
    words: ClassVar = {
        "data": "dataset",
        "modalities": "teacher",
        "views": "number of views",
        "augment": "augmentation",
    }

    def __init__(
        self,
        teacher: Teacher | FeaturesTeacher | None,
        pairs: Pairs,
        folder: str | Path,
        options: Options,
    ) -> None:
        self.teacher, self.options = teacher, options
        about = _describe(teacher)
        key = {
            "teacher": about["identity"],
            "modalities": about["modalities"],
            "data": pairs.digest(),
            "views": options.views,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        if options.views > 1:
            key["augment"] = sorted(set(options.augment))
        super().__init__(pairs, folder, about, key, options)

    def _source(self) -> sources.Pixels:
        return sources.source_for(self.teacher)

    def _fill(self, readable: list[Example]) -> dict[str, Any]:
        texts = [text for example in readable for text in example.captions]
        self._text_shards(texts)
        rows = {"image": len(readable) * self.options.views, "text": len(texts)}
        kinds = self.about["modalities"]
        return {
            "shards": {kind: self.journal.stored(kind) for kind in kinds},
            "rows": {kind: rows[kind] for kind in kinds},
            "files": self._views(readable),
        }

    def _views(self, readable: list[Example]) -> dict[str, str]:
        """The file that says which views the teacher saw, and its digest."""
        options = self.options
        if options.views == 1:
            return {}
        format.write_views(self.folder, readable, options.views, options.seed, options.augment)
        return {format.VIEWS: files.digest_file(self.folder / format.VIEWS)}

    def _text_shards(self, texts: Sequence[str]) -> None:
        if self.teacher is None or "text" not in self.teacher.modalities:
            return
        if not isinstance(self.teacher, FeaturesTeacher):
            work.tell_truncated(self.teacher, self.teacher.name, texts)
        size = self.options.batch_size
        first = len(self.journal.shards["text"]) * work.SHARD_ROWS
        with progress.bar("captions", len(texts), first) as bar:
            for start in range(first, len(texts), work.SHARD_ROWS):
                chunk = texts[start : start + work.SHARD_ROWS]
                features = sources.embed_texts(self.teacher, chunk, size, bar)
                self.journal.commit("text", self._array([features]))

    def _array(self, features: list[Tensor]) -> np.ndarray | None:
        if not features:
            return None
        rows = torch.cat(features)
        # a teacher that yields NaN once would poison every loss later, far from its cause
        if not torch.isfinite(rows).all():
            raise ModelError(f"{self.about['name']}: its features are not finite; check the model")
        return rows.numpy().astype(DTYPES[self.options.dtype])


def _describe(teacher: Teacher | FeaturesTeacher | None) -> dict[str, Any]:
    if teacher is None:
        nothing = ("name", "source", "dim", "licence", "parameters", *_SCALES)
        return dict.fromkeys(nothing) | {
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
        **{name: getattr(teacher, name, None) for name in _SCALES},
    }
