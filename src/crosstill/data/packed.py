"""Images inside larger files: slices of archives, and rows of compressed Parquet.

The path of such an image says all that reading it takes, so that any process can:

    shards/000003.tar@1536+48213/dog.jpg    48,213 bytes from byte 1,536 on
    train.parquet@12.57/dog.jpg             row 57 of row group 12
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from crosstill.data.base import read_image, regular, unreadable
from crosstill.data.gather import File, Folder
from crosstill.errors import ImageError
from crosstill.types import Example, image_id

_SLICE = re.compile(r"(.+?)@(\d+)\+(\d+)/", re.DOTALL)
_ROW = re.compile(r"(.+?)@(\d+)\.(\d+)/", re.DOTALL)
GROUPS = 4  # decoded row groups that are kept, one for each thread that reads


@dataclass(frozen=True)
class Packed:
    """Images in archives or tables under one folder; few may be files of their own.

    Attributes:
        base: the folder.
        column: of the images in Parquet.
        found: what is known of every image, by path; filled while the dataset is listed.
    """

    base: Path
    column: str = ""
    found: dict[str, File] = field(default_factory=dict)

    @property
    def root(self) -> None:
        return None

    @property
    def record(self) -> dict[str, Any]:
        return {"form": "packed", "root": str(self.base), "column": self.column}

    @property
    def read(self) -> Callable[[Example], bytes]:
        return partial(read_packed, self.base, self.column)

    def note(self, path: str, data: bytes) -> str:
        """Remember what an image is, and return its id."""
        known = File(image_id(data), len(data), "" if data else "empty file")
        self.found[path] = known
        return known.image_id

    def identify(self, paths: Sequence[str]) -> Mapping[str, File]:
        alone = [path for path in paths if path not in self.found]
        return self.found | Folder(self.base).identify(alone) if alone else self.found


def slice_path(container: str, offset: int, size: int, name: str) -> str:
    """The path of an image that lies in a file as it is."""
    return f"{container}@{offset}+{size}/{name}"


def row_path(container: str, group: int, row: int, name: str) -> str:
    """The path of an image that is a cell of compressed Parquet."""
    return f"{container}@{group}.{row}/{name}"


def read_packed(base: Path, column: str, example: Example) -> bytes:
    """The bytes of an image inside a larger file under a folder.

    Raises:
        ImageError: the larger file has gone or is shorter now, or cannot be read.
    """
    path = example.path
    try:
        if found := _SLICE.match(path):
            return _slice(regular(base / found[1]), int(found[2]), int(found[3]))
        if found := _ROW.match(path):
            place = str(regular(base / found[1]))
            return image_bytes(_group(place, column, int(found[2]))[int(found[3])].as_py()) or b""
    except (OSError, ValueError) as error:  # pyarrow's own are among them
        raise ImageError(path, unreadable(error)) from None
    except IndexError:
        raise ImageError(path, "cannot be read (the table around it is shorter now)") from None
    return read_image(base, example)


def image_bytes(cell: Any) -> bytes | None:
    """The bytes in a cell of a table, bare or, as Hugging Face keeps them, beside a path."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError("the file around it is shorter than it was")
    return data


@lru_cache(maxsize=GROUPS)
def _group(path: str, column: str, number: int) -> Any:
    """The cells of one row group; neighbours are mostly asked for one after the other."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, metadata=_footer(path)) as file:
        return file.read_row_group(number, columns=[column], use_threads=False)[column]


@lru_cache(maxsize=64)
def _footer(path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(path)
