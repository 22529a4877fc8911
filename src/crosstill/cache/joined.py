"""Join the feature caches of several teachers over one dataset: rows side by side, weighted.

    row = [sqrt(w_1) r_1, sqrt(w_2) r_2, ...] / sqrt(w_1 + w_2 + ...)

Each r is a unit row of one teacher, so the joined row is unit too, and the cosine of two joined
rows is the weighted mean of the teachers' cosines.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from crosstill import files, progress
from crosstill.cache import cache_builder, format
from crosstill.cache.feature_build import DTYPES
from crosstill.data import Pairs
from crosstill.errors import ConfigError, ImageError, MismatchError
from crosstill.types import Example

log = logging.getLogger(__name__)

# of a cache's key; whatever else is in it has to be the same in all, or is compared apart
_MAY_DIFFER = frozenset({"teacher", "modalities", "data", "dtype", "raw", "texts"})
_OWN_FILES = frozenset({format.IMAGES, format.CAPTIONS, format.QUARANTINE})


class Part(NamedTuple):
    """One teacher of a joined cache."""

    name: str  # unlike those of the others, and without dots
    columns: slice  # where its rows are in the joined ones
    share: float  # its weight over the sum of all

    @property
    def dim(self) -> int:
        return int(self.columns.stop - self.columns.start)


def parts(cache: format.CacheBase) -> tuple[Part, ...]:
    """List the teachers of a joined cache; none of a cache of one teacher's own."""
    teachers: list[Part] = []
    records = cache.teacher.get("parts", ())
    total, start = sum(record["weight"] for record in records), 0
    for record in records:
        columns = slice(start, start + record["dim"])
        name = _distinct_name(_short_name(record), [teacher.name for teacher in teachers])
        teachers.append(Part(name, columns, record["weight"] / total))
        start = columns.stop
    return tuple(teachers)


def join(
    caches: Sequence[str | Path | format.Cache],
    out: str | Path,
    weights: Sequence[float] | None = None,
) -> format.Cache:
    """Make one feature cache of several, or finish it, or find it already there.

    It has the sides, image and text, that all of them have, and is as precise as the most precise.
    Its rows are unit ones, whether or not the caches keep raw ones.

    Args:
        caches: feature caches of the same images, captions, splits and views.
        out: the folder of the joined one.
        weights: of the teachers, above 0; None is the same for all.

    Raises:
        ConfigError: no caches, one of them twice, or weights that do not fit.
        MismatchError: a score cache, one without features, or of other data or views; a folder
            that holds another cache.
        LockedError: another process is writing to the folder.
    """
    if not caches:
        raise ConfigError("join: give at least one cache")
    checked = _checked_weights(weights, len(caches))
    opened = [format.Cache(c) if isinstance(c, str | Path) else c for c in caches]
    for place, cache in enumerate(opened):
        _check_alike(opened[0], cache)
        if cache.folder.resolve() in [other.folder.resolve() for other in opened[:place]]:
            raise ConfigError(
                f"join: {cache.folder} is named twice; to count a teacher twice, give it a weight "
                "of 2"
            )
    return _JoinBuilder(opened, checked, out).make()


class _JoinBuilder(cache_builder.CacheBuilder[format.Cache]):
    """Build a joined cache: rows of other caches take the place of a teacher's."""

    opens = format.Cache
    kinds = ("image", "text")
    key_names: ClassVar = {"data": "dataset", "modalities": "teacher", "views": "number of views"}

    def __init__(
        self, caches: list[format.Cache], weights: Sequence[float], folder: str | Path
    ) -> None:
        first, self.caches, self.weights = caches[0], caches, weights
        teacher = _describe(caches, weights)
        own = {"teacher": teacher["identity"], "modalities": teacher["modalities"]}
        own["dtype"] = max((c.header["key"]["dtype"] for c in caches), key=list(DTYPES).index)
        key = first.header["key"] | own
        key.pop("raw", None)  # a joined row is made of unit rows
        super().__init__(_pairs(first), folder, teacher, key, cache_builder.ReadOptions())

    def _image_shards(self) -> None:  # no photo is read
        for kind in self.description["modalities"]:
            rows = self.caches[0].header["rows"][kind]
            first = len(self.journal.shards[kind]) * cache_builder.SHARD_ROWS
            with progress.bar(f"{kind} rows", rows, first) as bar:
                for start in range(first, rows, cache_builder.SHARD_ROWS):
                    block = np.arange(start, min(start + cache_builder.SHARD_ROWS, rows))
                    self.journal.commit(kind, self._rows(kind, block), quarantined=[])
                    bar.advance(len(block))

    def _rows(self, kind: str, block: np.ndarray) -> np.ndarray:
        """Compute the joined rows of a block, as they are stored."""
        views, sides = self.caches[0].views, []
        for cache, weight in zip(self.caches, self.weights, strict=True):
            rows = (
                cache.image_features(block // views, block % views)
                if kind == "image"
                else cache.text_features(block)
            )
            sides.append(nn.functional.normalize(rows, dim=1) * (weight / sum(self.weights)) ** 0.5)
        return torch.cat(sides, dim=1).numpy().astype(DTYPES[self.key["dtype"]])

    def _fill(self, readable: list[Example]) -> dict[str, Any]:
        first, kinds = self.caches[0], self.description["modalities"]
        others = {n: d for n, d in first.header["files"].items() if n not in _OWN_FILES}
        for name in others:
            files.write_atomic(self.folder / name, partial(shutil.copyfile, first.folder / name))
        return {
            "shards": {kind: self.journal.stored(kind) for kind in kinds},
            "rows": {kind: first.header["rows"][kind] for kind in kinds},
            "files": others,
        }


def _describe(caches: Sequence[format.Cache], weights: Sequence[float]) -> dict[str, Any]:
    """Make the header's record of the joined teacher, its parts included."""
    keep = ("name", "source", "dim", "licence", "parameters", "identity")
    records = [
        {**{name: cache.teacher[name] for name in keep}, "weight": weight}
        for cache, weight in zip(caches, weights, strict=True)
    ]
    counts = [record["parameters"] for record in records]
    kinds = frozenset.intersection(*(cache.modalities for cache in caches))
    for cache in caches:
        if cache.modalities - kinds:
            lost = " and ".join(sorted(cache.modalities - kinds))
            log.info("%s: its %s features are left out, others have none", cache.folder, lost)
        if cache.raw:
            log.info("%s: its raw rows are left out, joined rows are unit", cache.folder)
    return {
        "name": " + ".join(_short_name(record) for record in records),
        "source": None,
        "parameters": None if None in counts else sum(counts),
        "dim": sum(record["dim"] for record in records),
        "licence": _licence([record["licence"] for record in records]),
        "identity": {
            "family": "joined",
            "parts": files.digest_json([[one["identity"], one["weight"]] for one in records]),
        },
        "modalities": sorted(kinds),
        "parts": records,
    }


def _licence(licences: Sequence[str | None]) -> str | None:
    """Name all licences; a teacher without one is "not known", which a free one does not hide."""
    known = sorted({licence for licence in licences if licence})
    return " and ".join([*known, *(["not known"] if None in licences and known else [])]) or None


def _pairs(cache: format.Cache) -> Pairs:
    """Make the dataset of a cache, all splits, with its quarantine."""
    by_split = [cache.pairs(name) for name in sorted(set(cache.splits))]
    pairs = replace(
        by_split[0],
        examples=tuple(example for some in by_split for example in some.examples),
        licence=cache.header["data"].get("licence"),
    )
    for line in (cache.folder / format.QUARANTINE).read_text().splitlines():
        row = json.loads(line)
        pairs.quarantine.add(ImageError(row["path"], row["reason"]), row["bytes"])
    return pairs


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"weights: {len(weights)} for {count} caches; give one for each")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ConfigError(f"weights: {weight} is not above 0; leave that cache out instead")
    return [float(weight) for weight in weights]


def _check_alike(first: format.Cache, other: format.Cache) -> None:
    """Refuse a cache whose rows are not those of the first: other data, other views, or none."""
    if not other.modalities:
        raise MismatchError(f"{other.folder}: made without a teacher, it has no features; leave it")
    key, other_key = first.header["key"], other.header["key"]
    for name in sorted({*key, *other_key} - _MAY_DIFFER, reverse=True):  # views before augment
        if key.get(name) != other_key.get(name):
            raise MismatchError(
                f"{other.folder} has {name} = {other_key.get(name)} and {first.folder} has "
                f"{key.get(name)}; teachers are joined on the same views, so make one of the "
                "caches again"
            )
    if key.get("texts") != other_key.get("texts"):
        raise MismatchError(
            f"{other.folder} has other loose texts than {first.folder} ({other.loose:,} and "
            f"{first.loose:,}); cache both teachers over the same --texts"
        )
    for what, odd in _differences(first, other):
        if odd:
            raise MismatchError(
                f"{other.folder} is of another dataset than {first.folder}: {len(odd)} of their "
                f"images {what}, {odd[0]} among them; cache both teachers over the same data"
            )


def _differences(first: format.Cache, other: format.Cache) -> list[tuple[str, list[str]]]:
    """List the images in which two caches differ, by what differs: presence, split, captions."""
    images, others = _images(first), _images(other)
    both = images.keys() & others.keys()
    return [
        (
            "are in one alone",
            sorted((images | others)[key][0] for key in images.keys() ^ others.keys()),
        ),
        (
            "are of other splits",
            sorted(images[key][0] for key in both if images[key][1] != others[key][1]),
        ),
        (
            "have other captions",
            sorted(images[key][0] for key in both if images[key][2] != others[key][2]),
        ),
    ]


def _images(cache: format.Cache) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """List path, split and captions by image id."""
    return {
        example.image_id: (example.path, example.split, example.captions)
        for example in _pairs(cache).examples
    }


def _short_name(teacher: dict[str, Any]) -> str:
    return Path(str(teacher["name"])).name


def _distinct_name(name: str, taken: Sequence[str]) -> str:
    """Take the dots out of a name, and add a number where another teacher has it already."""
    plain = name.replace(".", "-")
    names = (plain if number == 1 else f"{plain}-{number}" for number in count(1))
    return next(name for name in names if name not in taken)
