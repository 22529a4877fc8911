"""Run a teacher over a dataset once and keep its features in a cache."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from crosstill import artefacts, files, images, progress
from crosstill.cache import cache_builder, format
from crosstill.data import Pairs
from crosstill.data.texts import LooseTexts, read_texts
from crosstill.errors import ConfigError, CorruptError, ImageError, ModelError, unknown
from crosstill.teachers.base import RawTeacher, Teacher, embed_by_length, kind_of
from crosstill.teachers.features import FeaturesTeacher
from crosstill.types import Example

log = logging.getLogger(__name__)

DTYPES = {"fp16": np.float16, "fp32": np.float32}
_SCALES = ("logit_scale", "logit_bias")  # of a dual encoder's own training, where it has them


@dataclass(frozen=True, kw_only=True)
class BuildOptions(cache_builder.ReadOptions):
    """The settings that decide the stored features, besides the teacher and the data."""

    dtype: str = "fp16"
    raw: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if self.views < 1 or self.batch_size < 1:
            raise ConfigError("views and batch_size must be at least 1")
        for name in (name for name in self.augment if name not in images.AUGMENTATIONS):
            raise unknown("augmentation", name, images.AUGMENTATIONS)
        if self.views > 1 and not self.augment:
            raise ConfigError("augment is empty, so every view would be the photo; name some")


def build_features(  # noqa: PLR0913  (every option of a cache is an argument)
    teacher: Teacher | FeaturesTeacher | None,
    pairs: Pairs,
    folder: str | Path,
    *,
    views: int = 1,
    augment: tuple[str, ...] = images.AUGMENTATIONS,
    dtype: str = "fp16",
    raw: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    strict: bool = False,
    teacher_licence: str | None = None,
    texts: Iterable[str | Path] | None = None,
) -> format.Cache:
    """Make the cache of `pairs` under `teacher`, or finish it, or find it already there.

    Args:
        teacher: any teacher of features; None keeps ids, captions and splits but no features,
            which is all that a loss without a teacher needs.
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        views: of each image; the first is the plain photo.
        augment: what makes the other views, of `images.AUGMENTATIONS`.
        dtype: how features are stored, "fp16" or "fp32".
        raw: also keep how long each row is before its L2 normalisation, for runs with
            `normalise = false`.
        seed: of the other views.
        batch_size: images or captions in one forward pass of the teacher.
        strict: stop at the first unreadable image.
        teacher_licence: where the teacher's card does not say.
        texts: texts without photos: a `Path` is a UTF-8 file with one a line, a `str` is a text.

    Raises:
        MismatchError: the folder holds a cache of another teacher, dataset or setting.
        LockedError: another process is building in the folder.
        ConfigError: an option that cannot be, or a folder that holds something else.
        ModelError: the teacher gives scores, or no image features, or unit rows alone where raw
            ones are wanted, or its vectors are those of other images, or there are loose texts and
            it has no features of them.
        ImageError: an image is unreadable and `strict` is set.
        DataError: no image is readable.
    """
    options = BuildOptions(
        views=views,
        augment=augment,
        dtype=dtype,
        raw=raw,
        seed=seed,
        batch_size=batch_size,
        strict=strict,
        teacher_licence=teacher_licence,
    )
    if teacher is None and raw:
        raise ConfigError("--raw: without a teacher there are no rows to keep; leave it out")
    rows = _Rows() if teacher is None else _rows_of(teacher, raw)
    if teacher is None or _begun_without_bare(pairs, Path(folder)):
        pairs = pairs.captioned()
    rows.check(pairs)
    loose = read_texts(texts or (), (text for e in pairs.examples for text in e.captions))
    if loose.note:
        log.info(loose.note)
        rows.check_loose(loose)
    return _FeatureBuilder(rows, pairs, folder, options, loose).make()


def _begun_without_bare(pairs: Pairs, folder: Path) -> bool:
    """Tell whether a folder's cache is of the captioned photos alone, as all were at first."""
    captioned = tuple(example for example in pairs.examples if example.captions)
    for name in (format.HEADER, cache_builder.JOURNAL):
        if len(captioned) in (0, len(pairs)) or not (folder / name).is_file():
            continue
        with suppress(CorruptError):  # the builder has more to say
            key = files.read_sealed(folder / name, {format.FORMAT})["key"]
            return bool(key["data"] == replace(pairs, examples=captioned).digest())
    return False


class _FeatureBuilder(cache_builder.CacheBuilder[format.Cache]):
    """Build a feature cache."""

    opens = format.Cache
    kinds = ("image", "text")
    key_names: ClassVar = {
        "data": "dataset",
        "modalities": "teacher",
        "views": "number of views",
        "augment": "augmentation",
        "raw": "choice of --raw",
        "texts": "set of loose texts",
    }

    def __init__(
        self,
        rows: "_Rows",
        pairs: Pairs,
        folder: str | Path,
        options: BuildOptions,
        loose: LooseTexts,
    ) -> None:
        self.rows, self.options, self.loose = rows, options, loose
        description = rows.describe()
        key = {
            "teacher": description["identity"],
            "modalities": description["modalities"],
            "data": pairs.digest(),
            "views": options.views,
            "seed": options.seed,
            "dtype": options.dtype,
        }
        if options.views > 1:
            key["augment"] = sorted(set(options.augment))
        if options.raw:
            key["raw"] = True
        if loose:
            key["texts"] = loose.digest
        super().__init__(pairs, folder, description, key, options)

    def _source(self) -> cache_builder.ImageSource:
        return self.rows

    def _fill(self, readable: list[Example]) -> dict[str, Any]:
        texts = _Texts([text for e in readable for text in e.captions], self.loose)
        self._text_shards(texts)
        rows = {"image": len(readable) * self.options.views, "text": len(texts)}
        kinds, options, more = self.description["modalities"], self.options, []
        if options.views > 1:
            count, seed, augment = options.views, options.seed, options.augment
            format.write_views(self.folder, readable, count, seed, augment)
            more.append(format.VIEWS)
        if self.loose:
            format.write_texts(self.folder, self.loose)
            more.append(format.TEXTS)
        return {
            "shards": {kind: self.journal.stored(kind) for kind in kinds},
            "rows": {kind: rows[kind] for kind in kinds},
            "files": artefacts.digests(self.folder, more),
        }

    def _text_shards(self, texts: Sequence[str]) -> None:
        if "text" not in self.rows.modalities:
            return
        self.rows.tell_truncated(texts)
        first = len(self.journal.shards["text"]) * cache_builder.SHARD_ROWS
        with progress.bar("texts" if self.loose else "captions", len(texts), first) as bar:
            for start in range(first, len(texts), cache_builder.SHARD_ROWS):
                shard = texts[start : start + cache_builder.SHARD_ROWS]
                features = self.rows.embed_texts(shard, self.options.batch_size, bar)
                self.journal.commit("text", self._array([features]))

    def _array(self, features: list[Tensor]) -> np.ndarray | None:
        if not features:
            return None
        rows = torch.cat(features)
        dtype = DTYPES[self.options.dtype]
        # a teacher that yields NaN once would poison every loss later, far from its cause
        if not torch.isfinite(rows).all():
            raise ModelError(
                f"{self.description['name']}: its features are not finite; check the model"
            )
        if not self.options.raw:
            return rows.numpy().astype(dtype)
        # one file for both, so that a kill cannot part them
        lengths = rows.norm(dim=1, keepdim=True)
        with np.errstate(over="ignore"):
            stored = torch.cat([nn.functional.normalize(rows, dim=1), lengths], dim=1).numpy()
            stored = stored.astype(dtype)
        if not np.allclose(stored[:, -1:], lengths, rtol=1e-3, atol=0):
            raise ModelError(
                f"{self.description['name']}: its rows are {float(lengths.min()):.3g} to "
                f"{float(lengths.max()):.3g} long, which {self.options.dtype} cannot hold; "
                "use --dtype fp32"
            )
        return stored


class _Texts(Sequence[str]):
    """The captions of a cache, then its loose texts, of which a slice at a time is in memory."""

    def __init__(self, captions: list[str], loose: LooseTexts) -> None:
        self._captions, self._loose = captions, loose

    def __len__(self) -> int:
        return len(self._captions) + len(self._loose)

    def __getitem__(self, rows: Any) -> Any:
        start, stop, _ = rows.indices(len(self))
        count = len(self._captions)
        loose = self._loose.take(max(start - count, 0), max(stop - count, 0))
        return self._captions[start:stop] + loose


class _Rows(cache_builder.ImageSource):
    """Rows of images and captions of a feature cache, and whose they are; here nobody's: none."""

    modalities: frozenset[str] = frozenset()

    def describe(self) -> dict[str, Any]:
        """Make the header's record of the teacher."""
        names = ("name", "source", "dim", "licence", "parameters", *_SCALES)
        return dict.fromkeys(names) | {"identity": {}, "modalities": []}

    def check(self, pairs: Pairs) -> None:
        """Refuse a dataset that the teacher does not know."""

    def check_loose(self, texts: LooseTexts) -> None:
        """Refuse loose texts of which the teacher has no features."""
        if "text" not in self.modalities:
            name = self.describe()["name"]
            lacks = f"{name} has no text features" if name else "there is no teacher"
            raise ModelError(
                f"--texts: {lacks}, so nothing can be learnt from texts without photos; leave them "
                "out, or give a teacher that reads texts"
            )

    def tell_truncated(self, texts: Sequence[str]) -> None:
        """Warn of captions that the teacher cuts."""

    def embed_texts(self, texts: Sequence[str], size: int, bar: progress.Bar) -> Tensor:
        """Make rows (T, D) of texts, `size` in a pass."""
        raise NotImplementedError


class _TeacherRows(_Rows):
    """Rows from a teacher that reads photos and texts: unit ones, or as it gives them."""

    def __init__(self, teacher: Teacher, raw: bool) -> None:
        super().__init__(teacher.preprocess)
        self._teacher, self.modalities = teacher, teacher.modalities
        self._embed_images, self._embed_texts = teacher.embed_images, teacher.embed_texts
        if raw:
            if not isinstance(teacher, RawTeacher):
                raise ModelError(
                    f"{teacher.name}: gives unit rows alone, so there are no others to keep; "
                    "leave --raw out"
                )
            self._embed_images, self._embed_texts = teacher.raw_images, teacher.raw_texts

    def describe(self) -> dict[str, Any]:
        return _describe(self._teacher, self._teacher.parameter_count())

    def load(self, file: bytes, example: Example, view: images.View | None) -> Tensor | None:
        return images.load(file, example.path, self._teacher.preprocess, view)

    def embed(self, loaded: Tensor) -> Tensor:
        return self._embed_images(loaded)

    def tell_truncated(self, texts: Sequence[str]) -> None:
        cache_builder.tell_truncated(self._teacher, self._teacher.name, texts)

    def embed_texts(self, texts: Sequence[str], size: int, bar: progress.Bar) -> Tensor:
        embed = self._embed_texts
        return embed_by_length(texts, lambda some: embed(some).cpu(), size, bar)


class _VectorRows(_Rows):
    """Rows from vectors made elsewhere, found by file name and by text."""

    def __init__(self, vectors: FeaturesTeacher, raw: bool) -> None:
        super().__init__()
        self._vectors, self.modalities, self._raw = vectors, vectors.modalities, raw

    def describe(self) -> dict[str, Any]:
        return _describe(self._vectors, None)

    def check(self, pairs: Pairs) -> None:
        self._vectors.refuse_unknown([example.path for example in pairs.examples])

    def check_loose(self, texts: LooseTexts) -> None:
        super().check_loose(texts)
        missing = [text for block in texts.blocks() for text in self._vectors.lacking(block)]
        if missing:
            raise ModelError(
                f"--texts: no vector of {len(missing):,} of {len(texts):,} texts in "
                f"{self._vectors.folder}, {missing[0][:60]!r} among them; add them, or take these "
                "lines out"
            )

    def load(self, file: bytes, example: Example, view: images.View | None) -> Tensor | None:
        images.decode(file, example.path)
        rows, missing = self._vectors.lookup_images([example.path], self._raw)
        if missing:
            raise ImageError(example.path, f"no vector in {self._vectors.name}")
        return rows[0]

    def embed(self, loaded: Tensor) -> Tensor:
        return loaded

    def embed_texts(self, texts: Sequence[str], size: int, bar: progress.Bar) -> Tensor:
        rows, missing = self._vectors.lookup_texts(texts, self._raw)
        if missing:
            raise ModelError(
                f"{self._vectors.folder}: no vector of {len(missing)} captions, "
                f"{missing[0][:60]!r} among them; add them, or take the texts' vectors out to "
                "learn from images only"
            )
        bar.advance(len(texts))
        return rows


def _rows_of(teacher: Any, raw: bool) -> _Rows:
    """Return the rows of a teacher by its kind.

    Raises:
        ModelError: it has no features, or none of images, or only unit ones.
    """
    sources: dict[str, type[Any]] = {"encoder": _TeacherRows, "vectors": _VectorRows}
    kind = kind_of(teacher)
    if kind not in sources:
        raise ModelError(
            f"{teacher.name}: a fusion model scores pairs and has no features; make a score cache"
        )
    rows: _Rows = sources[kind](teacher, raw)
    if "image" not in rows.modalities:
        raise ModelError(f"{teacher.name}: a teacher needs image features")
    return rows


def _describe(teacher: Teacher | FeaturesTeacher, parameters: int | None) -> dict[str, Any]:
    return {
        "name": teacher.name,
        "source": teacher.source,
        "parameters": parameters,
        "dim": teacher.dim,
        "licence": teacher.licence,
        "identity": teacher.identity(),
        "modalities": sorted(teacher.modalities),
        **{name: getattr(teacher, name, None) for name in _SCALES},
    }
