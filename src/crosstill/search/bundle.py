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
from typing import Any

import numpy as np

from crosstill import files
from crosstill.errors import CorruptError, MismatchError, ModelError
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
        return [RECORD, *sorted(self.record["files"]), *card]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Open a bundle; every file is checked against its SHA-256.

        Raises:
            ModelError: there is no bundle, or one that lacks a file.
            CorruptError: a file was damaged; it is named.
        """
        if not (folder / RECORD).is_file():
            raise ModelError(_absent(folder))
        record = files.read_sealed(folder / RECORD, {FORMAT})
        for name, digest in record["files"].items():
            if not (folder / name).is_file():
                raise ModelError(f"{folder}: half a bundle, {name} is missing; export it anew")
            files.check_digest(folder / name, digest)
        named = ("name", "dim", "precision", "max_length", "padding", "identity")
        return cls(
            folder=folder,
            preprocess=Preprocess.from_json(record["preprocess"]),
            record=record,
            **{key: record[key] for key in named},
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
    try:
        with np.load(path, allow_pickle=False) as held:
            return held["rows"].astype(np.float32), [key.decode() for key in held["images"]]
    except (OSError, ValueError, KeyError) as error:
        raise CorruptError(f"{path}: not readable ({error}); export the bundle anew") from None


def _absent(folder: Path) -> str:
    advice = "make one with `crosstill export RUN --to onnx --out BUNDLE`"
    if not folder.exists():
        return f"{folder}: no such folder; {advice}"
    if (folder / IMAGE).is_file() or (folder / TEXT).is_file():
        return f"{folder}: half a bundle, {RECORD} is missing; export it anew"
    return f"{folder}: no bundle; {advice}"
