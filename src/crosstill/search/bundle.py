"""The bundle: a student as files that need no torch.

bundle.json      seals itself: name, precision, preprocess, identity, SHA-256 of all but the card
image.onnx       uint8 pixels (B, 3, H, W) → unit rows (B, D)
text.onnx        token ids and mask (B, L) → unit rows (B, D)
tokenizer.json   special tokens and truncation included
README.md        the model card, which may be edited
calibration.npz  only where validation captions were at hand: their rows, and whose they are
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from crosstill import artefacts, files
from crosstill.errors import ConfigError, CorruptError, MismatchError, ModelError
from crosstill.preprocess import Preprocess

RECORD = "bundle.json"
IMAGE, TEXT, TOKENIZER = "image.onnx", "text.onnx", "tokenizer.json"
CALIBRATION = "calibration.npz"
CARD = "README.md"
FORMAT = 1

# what must agree wherever two artefacts meet, in the words of an error message
_PARTS = {
    "weights": "weights",
    "preprocess": "preprocess",
    "tokenizer": "tokenizer",
    "activation": "activation function",
    "precision": "precision",
}


_FILES = (IMAGE, TEXT, TOKENIZER, CALIBRATION, CARD)  # and no others


class _Record(artefacts.Record):
    """`bundle.json`."""

    name: str = Field(max_length=1000)
    dim: int = Field(ge=1, le=65_536)
    precision: Literal["fp32", "int8"]
    preprocess: dict[str, Any]
    max_length: int = Field(ge=1, le=65_536)
    padding: int = Field(ge=0, lt=2**31)
    identity: artefacts.Identity
    files: dict[Literal[_FILES], artefacts.Sha256]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Bundle:
    """An exported student.

    Attributes:
        folder: where it is.
        name: of the student.
        dim: D, the width of the joint space.
        precision: "fp32" or "int8".
        preprocess: how it wants its images.
        max_length: tokens of a text, special ones included; the tokenizer cuts the rest off.
        padding: id of the token that fills short texts up.
        identity: digests of all that decides its vectors: weights, preprocess, tokenizer,
            activation, precision.
        record: all of `bundle.json`.
    """

    folder: Path
    name: str
    dim: int
    precision: str
    preprocess: Preprocess
    max_length: int
    padding: int
    identity: dict[str, str]
    record: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity: equal where vectors may be compared."""
        return files.digest_json(self.identity)

    @property
    def files(self) -> list[str]:
        """Names of all files that belong to it; of them the card alone may change."""
        card = [CARD] if (self.folder / CARD).is_file() else []
        return [RECORD, *sorted(self.record["files"].keys() - {CARD}), *card]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Open a bundle; every file is checked against its SHA-256.

        Raises:
            ModelError: there is no bundle, or one that lacks a file.
            CorruptError: a file was damaged; it is named.
        """
        if not (folder / RECORD).is_file():
            raise ModelError(_absent(folder))
        record = artefacts.read(folder / RECORD, _Record, {FORMAT})
        for name in (IMAGE, TEXT, TOKENIZER, *record.files):
            if not artefacts.member(folder, name).is_file() or name not in record.files:
                raise ModelError(f"{folder}: half a bundle, {name} is missing; export it anew")
        artefacts.check_files(folder, record.files)
        artefacts.member(folder, CARD)
        try:
            preprocess = Preprocess.from_json(record.preprocess)
        except ConfigError as error:
            raise CorruptError(f"{folder / RECORD}: {error}") from None
        return cls(
            folder=folder,
            name=record.name,
            dim=record.dim,
            precision=record.precision,
            preprocess=preprocess,
            max_length=record.max_length,
            padding=record.padding,
            identity=record.identity,
            record=record.model_dump(),
        )


def check_same(expected: dict[str, str], found: dict[str, str], what: str) -> None:
    """Refuse vectors of two models in one place.

    Args:
        expected: identity of what is there.
        found: identity of what is to be used with it.
        what: opens the message, such as "photos.index was made with another bundle than small".

    Raises:
        MismatchError: they differ; the message names the parts in which they do.
    """
    differ = [word for part, word in _PARTS.items() if expected.get(part) != found.get(part)]
    if differ:
        raise MismatchError(
            f"{what}: not the same {', '.join(differ)}; use the bundle that it was made with, "
            "or make it anew"
        )


def calibration(bundle: Bundle) -> tuple[np.ndarray, list[str]] | None:
    """Rows of captions that the student has not learnt: float32 (C, D); the image id of each.

    None where the bundle was exported without such captions.
    """
    if CALIBRATION not in bundle.record["files"]:
        return None
    path = bundle.folder / CALIBRATION
    held = artefacts.archive(path, {"rows": ("f", 2), "images": ("S", 1)})
    rows, images = held["rows"], held["images"]
    if rows.shape != (len(images), bundle.dim) or not np.isfinite(rows).all():
        raise CorruptError(f"{path}: not the rows of this bundle; export it anew")
    return rows.astype(np.float32), [key.decode(errors="replace") for key in images]


def _absent(folder: Path) -> str:
    advice = "make one with `crosstill export RUN --to onnx --out BUNDLE`"
    if not folder.exists():
        return f"{folder}: no such folder; {advice}"
    if (folder / IMAGE).is_file() or (folder / TEXT).is_file():
        return f"{folder}: half a bundle, {RECORD} is missing; export it anew"
    return f"{folder}: no bundle; {advice}"
