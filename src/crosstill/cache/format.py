"""The format of a cache on disk, and the classes that open it and read it back by row.

A feature cache is a folder:

    cache.json         sealed header: teacher, data, views, dtype, SHA-256 of every other file
    images.parquet     one row an image: image_id, path, split
    captions.parquet   one row a caption: image (row of images.parquet), text
    texts.parquet      only with texts that have no photo: text, split
    image-00000.npy …  unit-norm features (rows, D): image i, view v is row i * views + v
    text-00000.npy …   unit-norm features (rows, D), one row a caption, then one a loose text
                       with `--raw` both have a last column (rows, D + 1): the length of the row
                       before its L2 normalisation
    views.parquet      with several views an image: which part of it each is, in which colours
    quarantine.jsonl   images that could not be read, with the reason
    pixels/            decoded photos and outputs of frozen towers, made on demand (see `memo`)

Rows are in the order of the image ids, so neither the order nor the place of the photos matters;
loose texts are in the order of their SHA-256. A photo may have no caption.
A student's photos are made from the views in `views.parquet`, not drawn again, so that they stay
what the teacher saw whatever a later version draws.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from crosstill import artefacts, data, files
from crosstill.data.texts import LooseTexts
from crosstill.errors import (
    ChangedError,
    CorruptError,
    DataError,
    ImageError,
    InputError,
    MismatchError,
)
from crosstill.images import Quarantine, View, draw_view
from crosstill.types import Example, Features, id_key

FORMAT = 1
HEADER = "cache.json"
IMAGES = "images.parquet"
CAPTIONS = "captions.parquet"
TEXTS = "texts.parquet"
VIEWS = "views.parquet"
QUARANTINE = "quarantine.jsonl"

_IMAGES = {"image_id": "string", "path": "binary", "split": "string"}
_CAPTIONS = {"image": "int32", "text": "string"}
_TEXTS = {"text": "string", "split": "string"}
_VIEWS = {"image": "int64", "view": "int64"}
_OF_VIEW = {f.name: "bool" if f.name == "flip" else "double" for f in fields(View)}

FEW_ROWS = 100_000  # that a table may hold whatever the size of its file
SWELLING = 50  # bytes of text in memory for each byte of a table's file
_GROUP = 1 << 18  # loose texts in a row group
LEAST = 1 << 26  # bytes of text that a table may always hold


class _Teacher(artefacts.Record):
    name: str | None = None  # None for a cache that was made without a teacher
    dim: int | None = None


class _Data(artefacts.Record):
    name: str
    source: dict[str, Any]


class Header(artefacts.Record):
    """The fields that the headers of all kinds of caches share."""

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


class _FeatureHeader(Header):
    """`cache.json`."""

    key: _Key  # type: ignore[assignment]
    shards: dict[Literal["image", "text"], list[_Shard]]


@dataclass(frozen=True)
class Split:
    """The rows of one split of a cache: its captions first, then its loose texts."""

    name: str
    images: np.ndarray  # (I,) rows of images.parquet
    captions: np.ndarray  # (T,) rows of `CacheBase.texts`
    owner: np.ndarray  # (T,) position in `images` of each caption's image; -1 of a loose text

    @property
    def pairs(self) -> int:
        """Number of captions that have a photo: they are the first of `captions`."""
        return int((self.owner >= 0).sum())

    @property
    def captioned(self) -> np.ndarray:
        """Positions in `images` of the photos that have captions, ascending."""
        return np.unique(self.owner[: self.pairs])

    def paired(self) -> "Split":
        """Leave out photos without captions and loose texts, on which no recall can be measured.

        A smaller split has a name of its own: arrays are kept by the names of splits.
        """
        captioned = self.captioned
        if len(captioned) == len(self.images) and self.pairs == len(self.captions):
            return self
        owner = np.searchsorted(captioned, self.owner[: self.pairs])
        images, captions = self.images[captioned], self.captions[: self.pairs]
        return Split(f"{self.name}-paired", images, captions, owner)


class ShardedRows:
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
        """Read rows, in the order in which they are given, as float32 (len(rows), D)."""
        rows = np.asarray(rows)
        if not len(rows):
            return torch.empty(0, self.dim or 0)
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows outside 0..{len(self) - 1}")
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), self._shards[0].shape[1]), dtype=np.float32)
        for shard in np.unique(shard_of):
            places = shard_of == shard
            out[places] = self._shards[shard][rows[places] - self._starts[shard]]
        return torch.from_numpy(out)


class CacheBase:
    """The images and texts of any kind of cache, in the order of the image ids.

    Opening one checks every checksum before anything is used.

    Attributes:
        texts: the captions, then the loose texts.
        owner: (T,) the image row of each caption; -1 of a loose text.
        noun: what the kind is called, in messages.
        contents: what a cache of the kind holds, in messages.
        remedy: how to make one, in messages.
        means: by modality, (D,), what is taken off each row: see `crosstill.cache.centring`.
        plain: the same cache with the teacher's rows as it gave them.

    Raises:
        InputError: there is no finished cache of this kind in the folder.
        CorruptError: a file is damaged, missing, or written by a newer crosstill.
    """

    file: ClassVar[str]  # of the header
    version: ClassVar[int]  # of the format
    model: ClassVar[type[artefacts.Record]]  # of the header
    task: ClassVar[str]  # "module:class" of the Task that a run from such a cache has
    noun: ClassVar[str]
    contents: ClassVar[str]
    remedy: ClassVar[str]
    plain: Any  # of the same kind

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.plain = self
        self.means: dict[str, Tensor] = {}
        self._require_header()
        header = artefacts.read(self.folder / self.file, self.model, {self.version})
        self.header: dict[str, Any] = header.model_dump()
        self._check()
        images = read_table(self.folder / IMAGES, _IMAGES).to_pydict()
        captions = read_table(self.folder / CAPTIONS, _CAPTIONS)
        self.image_ids: list[str] = images["image_id"]
        self.paths: list[str] = [path.decode("utf-8", "surrogateescape") for path in images["path"]]
        self.splits = np.array(images["split"], dtype=object)
        self.texts: list[str] = captions["text"].to_pylist()
        self.owner = captions["image"].to_numpy()
        if len(self.owner) and not 0 <= self.owner.min() <= self.owner.max() < len(self.image_ids):
            raise CorruptError(f"{self.folder / CAPTIONS}: captions of no image; build it anew")
        self._loose_splits = np.array([], dtype=object)  # of each loose text
        if TEXTS in self.header["files"]:
            loose = read_table(self.folder / TEXTS, _TEXTS)
            self._loose_splits = loose["split"].to_numpy()
            if odd := set(self._loose_splits) - {*data.SPLITS}:
                raise CorruptError(
                    f"{self.folder / TEXTS}: unknown split {min(odd)!r}; build it anew"
                )
            self.texts += loose["text"].to_pylist()
            self.owner = np.append(self.owner, np.full(len(loose), -1, self.owner.dtype))
        with artefacts.readable(self.folder / IMAGES):  # an id need not be hexadecimal
            keys = [id_key(image) for image in self.image_ids]
        self.keys = torch.tensor(keys, dtype=torch.int64)  # (I,)
        with artefacts.readable(self.folder / self.file):
            self.read = data.reader(self.header["data"]["source"])

    @property
    def modalities(self) -> frozenset[str]:
        """Return the sides whose features are stored: a subset of {"image", "text"}."""
        return frozenset()

    @property
    def listed(self) -> int:
        """Number of pairs in its candidate lists; 0 for a cache that has no lists."""
        return 0

    @property
    def scored(self) -> bool:
        """Tell whether the cache holds a teacher's scores of its candidate lists."""
        return False

    def caveat(self, split: Split) -> str:
        """Explain the recall among a split's candidate lists, in sentences; "" without lists."""
        return ""

    @property
    def loose(self) -> int:
        """Number of texts without a photo: the last of `texts`."""
        return len(self._loose_splits)

    @property
    def teacher(self) -> dict[str, Any]:
        return dict(self.header["teacher"])

    @property
    def dim(self) -> int | None:
        """Width of the features; None for a cache without features."""
        return None

    @property
    def raw(self) -> bool:
        """Tell whether it keeps how long the teacher's rows were before their normalisation."""
        return False

    @property
    def views(self) -> int:
        """Number of views of each image that the teacher saw."""
        return 1

    @property
    def digest(self) -> str:
        """SHA-256 of the key: everything that decides what is stored."""
        return files.digest_json(self.header["key"])

    def split(self, name: str) -> Split:
        """Find the rows of one split.

        Raises:
            DataError: no image of the cache is in it; the message names the splits there are.
        """
        images = np.flatnonzero(self.splits == name)
        if not len(images):
            known = ", ".join(sorted(set(self.splits)))
            raise DataError(f"{self.folder}: split {name!r} has no images (splits here: {known})")
        position = np.full(len(self.image_ids), -1)
        position[images] = np.arange(len(images))
        pairs = len(self.owner) - self.loose
        captions = np.flatnonzero(position[self.owner[:pairs]] >= 0)
        loose = pairs + np.flatnonzero(self._loose_splits == name)
        owner = np.append(position[self.owner[captions]], np.full(len(loose), -1))
        return Split(name, images, np.append(captions, loose), owner)

    def captions(self, split: str) -> list[str]:
        """List all texts of a split, from which a vocabulary can be trimmed or learnt."""
        return [self.texts[row] for row in self.split(split).captions]

    def pairs(self, split: str) -> data.Pairs:
        """Make a dataset of the photos and captions of a split, without its loose texts.

        Raises:
            DataError: no image of the cache is in it.
        """
        rows = self.split(split)
        captions: defaultdict[int, list[str]] = defaultdict(list)
        pairs = zip(rows.captions[: rows.pairs], rows.owner[: rows.pairs], strict=True)
        for caption, position in pairs:
            captions[int(position)].append(self.texts[caption])
        examples = tuple(
            Example(self.image_ids[row], self.paths[row], tuple(captions[position]), split)
            for position, row in enumerate(rows.images)
        )
        origin = self.header["data"]
        return data.Pairs(origin["name"], examples, Quarantine(), origin["source"], self.read)

    def split_features(self, split: Split) -> Features | None:
        """Read the teacher's rows of a split: (I, D) and (T, D); None unless there are both."""
        sides = self.split_sides(split)
        return Features(**sides) if len(sides) == 2 else None

    def split_sides(self, split: Split) -> dict[str, Tensor]:
        """Read the teacher's rows of a split by side, "image" and "text", those that there are."""
        return {}

    def summary(self) -> str:
        """Describe what is stored besides images and captions, in a few words."""
        return "no features"

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
        """Return the parameters of a view of the image in a row; None for the whole photo."""
        return self._seen[image, number] if number else None

    @cached_property
    def _seen(self) -> dict[tuple[int, int], View]:
        return read_views(self.folder)

    def _require_header(self) -> None:
        if (self.folder / self.file).is_file():
            return
        other = kind_of(self.folder)
        if other is not None:
            raise MismatchError(
                f"{self.folder}: holds {other.contents}, and {self.contents} are needed here; "
                f"make {self.remedy}"
            )
        raise InputError(f"{self.folder}: no finished cache there; make one with `crosstill cache`")

    def _check(self) -> None:
        artefacts.check_files(self.folder, {IMAGES: "", CAPTIONS: ""} | self.header["files"])


class Cache(CacheBase):
    """An opened feature cache: `image_features` and `text_features` of its rows."""

    file = HEADER
    version = FORMAT
    model = _FeatureHeader
    task = "crosstill.train.task:PairTask"
    noun = "a feature cache"
    contents = "a teacher's features"
    remedy = "a cache with `crosstill cache` and a dual encoder"

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

    @property
    def raw(self) -> bool:
        """As `CacheBase.raw`."""
        return bool(self.header["key"].get("raw", False))

    def image_features(
        self, images: np.ndarray, view: int | np.ndarray = 0, raw: bool = False
    ) -> Tensor:
        """Read teacher features of image rows.

        Args:
            images: rows of images.parquet.
            view: of which view.
            raw: as long as the teacher gave them; else of length 1.

        Returns:
            (len(images), D).

        Raises:
            InputError: the teacher left none of images, or raw ones were not kept.
        """
        return self._take("image", np.asarray(images) * self.views + view, raw)

    def text_features(self, captions: np.ndarray, raw: bool = False) -> Tensor:
        """Read teacher features (len(captions), D) of rows of `texts`, as `image_features` does."""
        return self._take("text", captions, raw)

    def features(
        self, images: np.ndarray, captions: np.ndarray, view: int | np.ndarray = 0
    ) -> Features:
        """Teacher features of matched rows, image and text."""
        return Features(self.image_features(images, view), self.text_features(captions))

    def split_sides(self, split: Split) -> dict[str, Tensor]:
        """As `CacheBase.split_sides`, of the plain photos."""
        read = {
            "image": lambda: self.image_features(split.images),
            "text": lambda: self.text_features(split.captions),
        }
        return {side: rows() for side, rows in read.items() if side in self.modalities}

    def summary(self) -> str:
        """As `CacheBase.summary`."""
        lengths = " with the lengths of raw rows" if self.raw else ""
        return f"{self.dim} wide{lengths}" if self.dim else super().summary()

    def _take(self, kind: str, rows: np.ndarray, raw: bool) -> Tensor:
        if kind not in self._rows:
            raise InputError(
                f"{self.folder}: the teacher {self.teacher['name']!r} left no {kind} features"
            )
        if raw and not self.raw:
            raise InputError(f"{self.folder}: keeps unit rows alone; make it anew with --raw")
        stored = self._rows[kind].take(rows)
        unit = stored[:, : self.dim]
        if kind in self.means:
            return functional.normalize(unit - self.means[kind], dim=-1)
        return unit * stored[:, self.dim :] if raw else unit

    def _open(self, kind: str) -> ShardedRows:
        rows = ShardedRows([self.folder / shard["file"] for shard in self.header["shards"][kind]])
        count = {"image": len(self.image_ids) * self.views}
        width = (self.dim or 0) + self.raw
        if len(rows) != count.get(kind, len(self.texts)) or rows.dim not in (width, None):
            raise CorruptError(f"{self.folder / HEADER}: its {kind} rows do not add up")
        return rows

    def _check(self) -> None:
        super()._check()
        if self.views > 1 and VIEWS not in self.header["files"]:
            raise CorruptError(
                f"{self.folder}: made before caches kept which views a teacher saw; build it anew"
            )
        for kind, shards in self.header["shards"].items():
            for shard in shards:
                artefacts.check_files(self.folder, {shard["file"]: shard["sha256"]})
            expected = self.header["rows"].get(kind)
            if sum(shard["rows"] for shard in shards) != expected:
                raise CorruptError(f"{self.folder / HEADER}: its {kind} rows do not add up")


def kind_of(folder: str | Path) -> type[CacheBase] | None:
    """Find the class that opens the cache in a folder; None where there is no finished cache."""
    for file, kind in artefacts.CACHES.items():
        if (Path(folder) / file).is_file():
            opener: type[CacheBase] = resolve_name(kind)
            return opener
    return None


def open(folder: str | Path) -> CacheBase:
    """Open a cache of any kind, as the class of its kind.

    Raises:
        InputError: there is no finished cache in the folder.
        CorruptError: a file is damaged, missing, or written by a newer crosstill.
    """
    return (kind_of(folder) or Cache)(folder)


def write_tables(folder: Path, examples: Sequence[Any]) -> dict[str, str]:
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
    captions = pa.table(
        {"image": pa.array(owner, pa.int32()), "text": pa.array(texts, pa.string())}
    )
    for name, table in ((IMAGES, images), (CAPTIONS, captions)):
        files.write_atomic(folder / name, partial(pq.write_table, table))
    return artefacts.digests(folder, [IMAGES, CAPTIONS])


def write_texts(folder: Path, texts: LooseTexts) -> None:
    """Write the table of loose texts."""

    def write(path: Path) -> None:
        schema = pa.schema(_TEXTS.items())
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, len(texts), _GROUP):
                rows = slice(start, start + _GROUP)
                columns = [texts.table(rows.start, rows.stop), pa.array(texts.splits[rows])]
                writer.write_table(pa.table(columns, schema))

    files.write_atomic(folder / TEXTS, write)


def write_views(
    folder: Path, examples: Sequence[Example], views: int, seed: int, kinds: Collection[str]
) -> None:
    """Draw views 1, 2, … of every image and write their parameters, one row a view."""
    rows = []
    for image, example in enumerate(examples):
        for number in range(1, views):
            view = draw_view(example.image_id, number, seed, kinds)
            rows.append({"image": image, "view": number, **(asdict(view) if view else {})})
    table = pa.Table.from_pylist(rows)
    files.write_atomic(folder / VIEWS, partial(pq.write_table, table))


def read_views(folder: Path) -> dict[tuple[int, int], View]:
    """Read the parameters of views, by the row of the image and the number of the view."""
    with artefacts.readable(folder / VIEWS):
        rows = read_table(folder / VIEWS, _VIEWS, _OF_VIEW).to_pylist()
        return {(row.pop("image"), row.pop("view")): View(**row) for row in rows}


def read_table(
    path: Path, schema: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> pa.Table:
    """Read a Parquet table that is no larger than its file lets expect.

    A run of equal values takes a few bytes of a file and any number of rows: a table has at most
    a row for each byte of the file, `FEW_ROWS` aside, and swells at most `SWELLING` times.

    Args:
        path: the file.
        schema: Arrow's type of each column that is read, as text.
        optional: the same of columns that may be absent.

    Raises:
        CorruptError: it is a link, damaged, lacks a column, or would be too large.
    """
    artefacts.member(path.parent, path.name)
    with artefacts.readable(path, pa.ArrowException):
        size = path.stat().st_size
        with pq.ParquetFile(path) as file:
            about = file.schema_arrow
            there = {k: v for k, v in (optional or {}).items() if k in about.names}
            schema = {**schema, **there}
            for name, kind in schema.items():
                if name not in about.names or str(about.field(name).type) != kind:
                    raise ValueError(f"no column {name} of {kind}")
            rows = file.metadata.num_rows
            if rows > max(FEW_ROWS, size):
                raise ValueError(f"{rows} rows in {files.amount(size)}")
        texts = [name for name, kind in schema.items() if kind in ("string", "binary")]
        packed = pq.read_table(path, columns=list(schema), read_dictionary=texts, memory_map=False)
        packed.validate(full=True)  # that texts are UTF-8
        _check_swelling(packed, size)
        return packed.cast(pa.schema([about.field(name) for name in schema]))


def _check_swelling(packed: pa.Table, size: int) -> None:
    """Refuse a table whose texts, written out, would take far more than its file."""
    total = 0
    for column in packed.itercolumns():
        if column.null_count:
            raise ValueError("an empty cell")
        for chunk in column.chunks:
            if hasattr(chunk, "dictionary") and len(chunk):
                lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
                total += pc.sum(lengths.cast("int64")).as_py() or 0
    if total > max(LEAST, SWELLING * size):
        raise ValueError(f"{files.amount(total)} of text in {files.amount(size)}")
