"""Precomputed vectors as a teacher: a folder of rows and of the names they belong to.

    filenames.txt    one image a line
    *.npy            its vectors, (I, D), any float type
    captions.txt     optional: one text a line
    *text*.npy       the texts' vectors, (T, D)
or one .safetensors with the keys "image" and "text" in place of the two .npy files.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from crosstill import files, formats
from crosstill.data.pairs import read_licence, read_text
from crosstill.errors import ModelError
from crosstill.teachers.base import Kind, directed, unit

_NAMES = {"image": "filenames.txt", "text": "captions.txt"}
_BLOCK = 65_536  # rows checked at a time: a memory-mapped file never comes in whole


def holds(folder: Path) -> bool:
    """Tell whether a folder holds precomputed vectors rather than a model."""
    vectors = (folder / _NAMES["image"]).is_file() or any(_files(folder, ".npy"))
    return vectors and not (folder / "config.json").exists()


class FeaturesTeacher:
    """Precomputed vectors, looked up by file name or text; it embeds nothing new.

    Attributes:
        filenames: the images it knows, in the order of its rows.
        captions: the texts it knows, in the order of its rows; empty when it has none.

    Raises:
        ModelError: files that are missing or of the wrong shape, NaN or zero rows, repeated names.
        DataError: filenames.txt or captions.txt is not UTF-8.
    """

    kind: ClassVar[Kind] = "vectors"
    preprocess = None

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.source = str(folder.absolute())
        self.licence = read_licence(folder)
        self._rows = _read_rows(folder)
        if "image" not in self._rows:
            raise ModelError(f"{folder}: no image vectors; put a .npy beside filenames.txt")
        self.modalities = frozenset(self._rows)
        self.dim = int(self._rows["image"].shape[-1])
        names = {kind: _read_names(folder / _NAMES[kind]) for kind in self._rows}
        self.filenames, self.captions = names["image"], names.get("text", [])
        for kind, rows in self._rows.items():
            _check(folder, kind, rows, (len(names[kind]), self.dim))
        keys = [formats.name_key(name) for name in self.filenames]
        self._by_path = _unique(folder / _NAMES["image"], keys)
        # Images often share a caption; its rows are alike, so the first one serves.
        self._by_text: dict[str, int] = {}
        for row, text in enumerate(self.captions):
            self._by_text.setdefault(text, row)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """Rows by base name; a name that several folders share decides nothing and is left out."""
        rows: dict[str, list[int]] = {}
        for row, path in enumerate(map(formats.name_key, self.filenames)):
            rows.setdefault(_base(path), []).append(row)
        return {name: places[0] for name, places in rows.items() if len(places) == 1}

    @cached_property
    def _identity(self) -> dict[str, str]:
        paths = _files(self.folder, ".npy", ".safetensors")
        weights = {p.name: files.digest_file(p) for p in paths}
        names = {k: files.digest_file(self.folder / _NAMES[k]) for k in sorted(self._rows)}
        return {
            "weights": files.digest_json([weights, names]),
            "preprocess": "none",
            "tokenizer": "none",
            "activation": "none",
            "family": "features",
        }

    def identity(self) -> dict[str, str]:
        return dict(self._identity)

    def lookup_images(self, paths: Sequence[str], raw: bool = False) -> tuple[Tensor, list[str]]:
        """Look up vectors of images by path and else by base name, in any Unicode form.

        Args:
            paths: of the images.
            raw: give rows as they stand in the file; else at length 1.

        Returns:
            (n, D) rows of the paths that were found, in the order given, and the other paths.
        """
        keys = map(formats.name_key, paths)
        rows = [self._by_path.get(key, self._by_name.get(_base(key))) for key in keys]
        return self._take("image", rows, raw), _lacking(paths, rows)

    def refuse_unknown(self, paths: Sequence[str]) -> None:
        """Refuse a dataset of which no image has a vector: its names are written otherwise.

        Raises:
            ModelError: no path is among the file names.
        """
        if len(self.lookup_images(paths)[1]) == len(paths):
            raise ModelError(
                f"none of the {len(self.filenames)} names in {self.folder / _NAMES['image']} is a "
                f"file name of the dataset; the first is {self.filenames[0]!r}, and the dataset's "
                f"{paths[0]!r}"
            )

    def lookup_texts(self, texts: Sequence[str], raw: bool = False) -> tuple[Tensor, list[str]]:
        """Look up vectors of texts, by the very text; as `lookup_images` else.

        Raises:
            ModelError: the folder has no text vectors.
        """
        if "text" not in self._rows:
            raise ModelError(
                f"{self.folder}: image vectors only; add captions.txt and a *text*.npy, or choose "
                "losses that need no teacher texts"
            )
        rows = [self._by_text.get(text.strip()) for text in texts]
        return self._take("text", rows, raw), _lacking(texts, rows)

    def lacking(self, texts: Iterable[str]) -> list[str]:
        """List the texts that have no vector."""
        return [text for text in texts if text.strip() not in self._by_text]

    def _take(self, kind: str, chosen: list[int | None], raw: bool) -> Tensor:
        rows = self._rows[kind][[row for row in chosen if row is not None]]
        scaled = directed if raw else unit
        return scaled(torch.from_numpy(rows.astype(np.float32)), str(self.folder))


def load(folder: Path, name: str, device: torch.device | None = None) -> FeaturesTeacher:
    """Open a folder of vectors; nothing is computed, so the device does not matter."""
    return FeaturesTeacher(folder, name)


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _files(folder: Path, *endings: str) -> list[Path]:
    """List the files of a folder with one of the endings, hidden ones aside."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if not formats.hidden(path.name))
    return sorted(path for path in paths if formats.ending(path.name) in endings)


def _lacking(names: Sequence[str], rows: list[int | None]) -> list[str]:
    return [name for name, row in zip(names, rows, strict=True) if row is None]


def _read_rows(folder: Path) -> dict[str, np.ndarray]:
    """Read the arrays, by "image" and "text"."""
    rows: dict[str, np.ndarray] = {}
    for path in _files(folder, ".npy", ".safetensors"):
        for kind, array in _read_file(path).items():
            if kind in rows:
                raise ModelError(f"{path}: a second file of {kind} vectors; keep one of them")
            rows[kind] = array
    return rows


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        if formats.ending(path.name) == ".npy":
            kind = "text" if "text" in path.stem.lower() else "image"
            return {kind: np.load(path, mmap_mode="r", allow_pickle=False)}
        return {k: v for k, v in load_file(path).items() if k in _NAMES}
    except (ValueError, EOFError, OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable array of numbers ({error})") from None


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ModelError(f"{path}: missing; write there what each row of the vectors belongs to")
    return [line.strip() for line in formats.lines(read_text(path))]


def _unique(path: Path, names: list[str]) -> dict[str, int]:
    """Map each name to its row; refuse a name that stands twice."""
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if name in rows:
            raise ModelError(
                f"{path}: line {row + 1} repeats line {rows[name] + 1} ({name[:80]!r}); keep one"
            )
        rows[name] = row
    return rows


def _check(folder: Path, kind: str, rows: np.ndarray, shape: tuple[int, int]) -> None:
    if rows.ndim != 2 or rows.shape != shape or rows.dtype.kind != "f":
        raise ModelError(
            f"{folder}: {kind} vectors are {rows.dtype} of shape {rows.shape}, but "
            f"{_NAMES[kind]} and the image vectors ask for floats of shape {shape}"
        )
    for start in range(0, len(rows), _BLOCK):
        lengths = np.linalg.norm(rows[start : start + _BLOCK].astype(np.float32), axis=1)
        bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
        if bad.size:
            raise ModelError(
                f"{folder}: {kind} vector {start + bad[0] + 1} ({_NAMES[kind]}, same line) is "
                "NaN, infinite or zero; compute it again or remove the line"
            )
