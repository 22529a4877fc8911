"""A finished cache: what a teacher said about a dataset, read back by row.

A cache is a folder:

    cache.json         sealed header: teacher, data, views, dtype, SHA-256 of every other file
    images.parquet     one row an image: image_id, path, split
    captions.parquet   one row a caption: image (row of images.parquet), text
    image-00000.npy …  unit-norm features (rows, D): image i, view v is row i * views + v
    text-00000.npy …   unit-norm features (rows, D), one row a caption
    views.parquet      with several views an image: which part of it each is, in which colours
    quarantine.jsonl   images that could not be read, with the reason
    pixels/            decoded photos for students, made on demand

Rows are in the order of the image ids, so neither the order nor the place of the photos matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor

from crosstill import artefacts, data, files
from crosstill.cache import tables, views
from crosstill.errors import (
    ChangedError,
    CorruptError,
    DataError,
    ImageError,
    InputError,
    MismatchError,
)
from crosstill.images import Quarantine, View
from crosstill.types import Example, Features, id_key

FORMAT = 1
HEADER = "cache.json"
SCORES = "scores.json"  # the header of a score cache, see crosstill.cache.scores
IMAGES = "images.parquet"
CAPTIONS = "captions.parquet"
QUARANTINE = "quarantine.jsonl"

# by the header that is there, when the other is asked for
_WRONG_KIND = {
    HEADER: "holds a teacher's features, and scores of pairs are needed here; make a score cache "
    "with `crosstill cache` and a fusion model",
    SCORES: "holds scores of pairs, and a teacher's features are needed here; make a cache with "
    "`crosstill cache` and a dual encoder",
}


_IMAGES = {"image_id": "string", "path": "binary", "split": "string"}
_CAPTIONS = {"image": "int32", "text": "string"}


class _Teacher(artefacts.Record):
    name: str | None = None  # of none, where a cache was made without a teacher
    dim: int | None = None


class _Data(artefacts.Record):
    name: str
    source: dict[str, Any]


class Header(artefacts.Record):
    """What the headers of all caches say."""

    key: dict[str, Any]
    teacher: _Teacher
    data: _Data
    rows: dict[str, int]
    files: artefacts.Digests


class _Shard(artefacts.Record):
    file: artefacts.Name
    sha256: artefacts.Sha256
    rows: int = Field(ge=1)


class _Key(artefacts.Record):
    views: int = Field(ge=1)


class _Features(Header):
    """`cache.json`."""

    key: _Key  # type: ignore[assignment]
    shards: dict[Literal["image", "text"], list[_Shard]]


@dataclass(frozen=True)
class Split:
    """The rows of one split: what training and evaluation walk over."""

    name: str
    images: np.ndarray  # (I,) rows of images.parquet
    captions: np.ndarray  # (T,) rows of captions.parquet
    owner: np.ndarray  # (T,) position in `images` of each caption's image


class Rows:
    """Feature rows spread over memory-mapped shards."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._shards = [artefacts.array(path, "f", 2, mmap=True) for path in paths]
        if len({shard.shape[1] for shard in self._shards}) > 1:
            raise CorruptError(f"{paths[0].parent}: shards of several widths; build it anew")
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int | None:
        """Width of a row; None where there is no shard."""
        return self._shards[0].shape[1] if self._shards else None

    def take(self, rows: np.ndarray) -> Tensor:
        """The asked rows, in the asked order, as float32 (len(rows), D)."""
        rows = np.asarray(rows)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows outside 0..{len(self) - 1}")
        which = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), self._shards[0].shape[1]), dtype=np.float32)
        for shard in np.unique(which):
            mine = which == shard
            out[mine] = self._shards[shard][rows[mine] - self._starts[shard]]
        return torch.from_numpy(out)


class Listing:
    """What every cache holds: which images and captions there are, in order of the image ids.

    Opening one checks every checksum before anything is used.

    Raises:
        InputError: there is no finished cache of this kind in the folder.
        CorruptError: a file is damaged, missing, or written by a newer crosstill.
    """

    file: ClassVar[str]  # of the header
    version: ClassVar[int]  # of the format
    model: ClassVar[type[artefacts.Record]]  # of the header

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._find()
        header = artefacts.read(self.folder / self.file, self.model, {self.version})
        self.header: dict[str, Any] = header.model_dump()
        self._check()
        images = tables.read(self.folder / IMAGES, _IMAGES).to_pydict()
        captions = tables.read(self.folder / CAPTIONS, _CAPTIONS)
        self.image_ids: list[str] = images["image_id"]
        self.paths: list[str] = [path.decode("utf-8", "surrogateescape") for path in images["path"]]
        self.splits = np.array(images["split"], dtype=object)
        self.texts: list[str] = captions["text"].to_pylist()
        self.owner = captions["image"].to_numpy()  # (T,) image row of each caption
        if len(self.owner) and not 0 <= self.owner.min() <= self.owner.max() < len(self.image_ids):
            raise CorruptError(f"{self.folder / CAPTIONS}: captions of no image; build it anew")
        self.keys = torch.tensor([id_key(i) for i in self.image_ids], dtype=torch.int64)  # (I,)
        with artefacts.readable(self.folder / self.file):
            self.read = data.reader(self.header["data"]["source"])

    @property
    def modalities(self) -> frozenset[str]:
        """Which features are stored: a subset of {"image", "text"}."""
        return frozenset()

    @property
    def teacher(self) -> dict[str, Any]:
        return dict(self.header["teacher"])

    @property
    def dim(self) -> int | None:
        """Width of the features; None for a cache without features."""
        return None

    @property
    def views(self) -> int:
        """How many views of each image the teacher saw."""
        return 1

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides what is stored."""
        return files.digest_json(self.header["key"])

    def split(self, name: str) -> Split:
        """The rows of one split.

        Raises:
            DataError: no image of the cache is in it; the message names the splits there are.
        """
        images = np.flatnonzero(self.splits == name)
        if not len(images):
            known = ", ".join(sorted(set(self.splits)))
            raise DataError(f"{self.folder}: split {name!r} has no images (splits here: {known})")
        position = np.full(len(self.image_ids), -1)
        position[images] = np.arange(len(images))
        captions = np.flatnonzero(position[self.owner] >= 0)
        return Split(name, images, captions, position[self.owner[captions]])

    def captions(self, split: str) -> list[str]:
        """The captions of a split: what a trimmed or learnt vocabulary is made from."""
        return [self.texts[row] for row in self.split(split).captions]

    def pairs(self, split: str) -> data.Pairs:
        """The photos and captions of a split, as a dataset.

        Raises:
            DataError: no image of the cache is in it.
        """
        rows = self.split(split)
        told: defaultdict[int, list[str]] = defaultdict(list)
        for caption, position in zip(rows.captions, rows.owner, strict=True):
            told[int(position)].append(self.texts[caption])
        examples = tuple(
            Example(self.image_ids[row], self.paths[row], tuple(told[position]), split)
            for position, row in enumerate(rows.images)
        )
        about = self.header["data"]
        return data.Pairs(about["name"], examples, Quarantine(), about["source"], self.read)

    def photo(self, row: int) -> bytes:
        """Read the photo of an image row: the bytes that the cache was made from.

        Raises:
            DataError: it is no longer where the cache found it.
            MismatchError: another photo is there.
        """
        path = self.paths[row]
        try:
            return self.read(Example(self.image_ids[row], path, (), self.splits[row]))
        except ChangedError:
            raise MismatchError(
                f"{path}: this photo has changed since the cache {self.folder} was made; put it "
                "back, or build the cache again in another folder"
            ) from None
        except ImageError as error:
            raise DataError(
                f"{path}: not where the cache {self.folder} found it ({error.reason}); if the "
                "photos moved, run `crosstill cache` again with the new --images: it only updates "
                "the place"
            ) from None

    def view(self, image: int, number: int) -> View | None:
        """What the teacher saw as that view of the image in that row; None for the whole photo."""
        return self._seen[image, number] if number else None

    @cached_property
    def _seen(self) -> dict[tuple[int, int], View]:
        return views.read(self.folder)

    def _find(self) -> None:
        for name in {HEADER, SCORES} - {self.file}:
            if (self.folder / name).is_file() and not (self.folder / self.file).is_file():
                raise MismatchError(f"{self.folder}: {_WRONG_KIND[name]}")
        if not (self.folder / self.file).is_file():
            raise InputError(
                f"{self.folder}: no finished cache there; make one with `crosstill cache`"
            )

    def _check(self) -> None:
        artefacts.check_files(self.folder, {IMAGES: "", CAPTIONS: ""} | self.header["files"])


class Cache(Listing):
    """An opened feature cache: `image_features` and `text_features` of its rows."""

    file = HEADER
    version = FORMAT
    model = _Features

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._rows = {kind: self._open(kind) for kind in self.modalities}

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(self.header["shards"])

    @property
    def dim(self) -> int | None:
        return self.header["teacher"]["dim"]

    @property
    def views(self) -> int:
        return int(self.header["key"]["views"])

    def image_features(self, images: np.ndarray, view: int | np.ndarray = 0) -> Tensor:
        """Teacher features (len(images), D) of image rows; `view` says of which view."""
        return self._kind("image").take(np.asarray(images) * self.views + view)

    def text_features(self, captions: np.ndarray) -> Tensor:
        """Teacher features (len(captions), D) of caption rows."""
        return self._kind("text").take(captions)

    def features(
        self, images: np.ndarray, captions: np.ndarray, view: int | np.ndarray = 0
    ) -> Features:
        """Both sides of matched rows."""
        return Features(self.image_features(images, view), self.text_features(captions))

    def _kind(self, kind: str) -> Rows:
        if kind not in self._rows:
            raise InputError(
                f"{self.folder}: the teacher {self.teacher['name']!r} left no {kind} features"
            )
        return self._rows[kind]

    def _open(self, kind: str) -> Rows:
        rows = Rows([self.folder / shard["file"] for shard in self.header["shards"][kind]])
        header, count = self.header, {"image": len(self.image_ids) * self.views}
        if len(rows) != count.get(kind, len(self.texts)) or rows.dim not in (
            header["teacher"]["dim"],
            None,
        ):
            raise CorruptError(f"{self.folder / HEADER}: its {kind} rows do not add up")
        return rows

    def _check(self) -> None:
        super()._check()
        if self.views > 1 and views.NAME not in self.header["files"]:
            raise CorruptError(
                f"{self.folder}: made before caches kept which views a teacher saw; build it anew"
            )
        for kind, shards in self.header["shards"].items():
            for shard in shards:
                artefacts.check_files(self.folder, {shard["file"]: shard["sha256"]})
            expected = self.header["rows"].get(kind)
            if sum(shard["rows"] for shard in shards) != expected:
                raise CorruptError(f"{self.folder / HEADER}: its {kind} rows do not add up")


def write_manifest(folder: Path, examples: Sequence[Any]) -> dict[str, str]:
    """Write the two Parquet tables of readable images; return file name → SHA-256."""
    images = pa.table(
        {
            "image_id": [example.image_id for example in examples],
            # bytes, because a file name need not be valid UTF-8
            "path": [example.path.encode("utf-8", "surrogateescape") for example in examples],
            "split": [example.split for example in examples],
        }
    )
    owner = [row for row, example in enumerate(examples) for _ in example.captions]
    texts = [text for example in examples for text in example.captions]
    captions = pa.table({"image": pa.array(owner, pa.int32()), "text": texts})
    for name, table in ((IMAGES, images), (CAPTIONS, captions)):
        files.write_atomic(folder / name, partial(pq.write_table, table))
    return {name: files.digest_file(folder / name) for name in (IMAGES, CAPTIONS)}
