"""Bundles: the files of an exported student, and the encoder that runs them without torch.

bundle.json      seals itself: name, precision, preprocess, identity, SHA-256 of all but the card
image.onnx       uint8 pixels (B, 3, H, W) → unit rows (B, D)
text.onnx        token ids and mask (B, L) → unit rows (B, D)
tokenizer.json   special tokens and truncation included
README.md        the model card, which may be edited
calibration.npz  rows of validation captions and ids of their images, if there were any
"""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field

from crosstill import artefacts, extras, files, pixels
from crosstill.errors import ConfigError, CorruptError, MismatchError, ModelError
from crosstill.formats import by_length, encodable

RECORD = "bundle.json"
IMAGE, TEXT, TOKENIZER = "image.onnx", "text.onnx", "tokenizer.json"
CALIBRATION = "calibration.npz"
CARD = "README.md"
FORMAT = 1
BATCH = 32  # items of a pass: more gains nothing on a CPU and holds memory

# what must agree wherever two artefacts meet, in the words of an error message
_PARTS = {
    "weights": "weights",
    "preprocess": "preprocess",
    "tokenizer": "tokenizer",
    "activation": "activation function",
    "precision": "precision",
}

_FILES = (IMAGE, TEXT, TOKENIZER, CALIBRATION, CARD)  # and no others

_DOMAINS = ("", "ai.onnx")  # of ONNX itself: others are code that somebody has added
_GRAPH, _FUNCTIONS = 7, 25  # fields of ModelProto, as onnx.proto numbers them
_NODE, _TENSOR, _SPARSE = 1, 5, 15  # of GraphProto
_ATTRIBUTE, _DOMAIN = 5, 7  # of NodeProto
_TENSORS, _GRAPHS, _SPARSES = (5, 10), (6, 11), (22, 23)  # of AttributeProto
_EXTERNAL = (13, 14)  # of TensorProto: external_data, data_location


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
    preprocess: pixels.Preprocess
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
    def open(cls, folder: Path) -> Self:
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
            preprocess = pixels.Preprocess.from_json(record.preprocess)
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


def check_same(expected: dict[str, str], other: dict[str, str], what: str) -> None:
    """Check that two artefacts belong to one model.

    Args:
        expected: identity of the artefact that is there.
        other: identity of the one to be used with it.
        what: opens the message, such as "photos.index was made with another bundle than small".

    Raises:
        MismatchError: they differ; the message names the parts in which they do.
    """
    differ = [word for part, word in _PARTS.items() if expected.get(part) != other.get(part)]
    if differ:
        raise MismatchError(
            f"{what}: not the same {', '.join(differ)}; use the bundle that it was made with, "
            "or make it anew"
        )


def calibration(bundle: Bundle) -> tuple[np.ndarray, list[str]] | None:
    """Read a bundle's calibration captions, on which the student was not trained.

    Returns:
        Their unit rows float32 (C, D) and the image id of each; None where the bundle was exported
        without such captions.

    Raises:
        CorruptError: the file does not fit the bundle.
    """
    if CALIBRATION not in bundle.record["files"]:
        return None
    path = bundle.folder / CALIBRATION
    arrays = artefacts.archive(path, {"rows": ("f", 2), "images": ("S", 1)})
    rows, images = arrays["rows"], arrays["images"]
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


class Encoder:
    """Encodes photos and texts by a bundle's towers, each loaded when it is first used.

    Several threads may share one.

    Args:
        bundle: the exported student.
        threads: that one pass may use.

    Every method that loads a tower raises a ConfigError where onnxruntime is not installed, and a
    CorruptError where a graph or the tokenizer cannot be read.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self.bundle, self.dim, self.threads = bundle, bundle.dim, threads
        # 8-bit activations share one scale a pass: beside others an item would get other vectors
        self._batch = 1 if bundle.precision == "int8" else BATCH

    @cached_property
    def _image(self) -> Any:
        return _session(self.bundle, IMAGE, self.threads)

    @cached_property
    def _text(self) -> Any:
        return _session(self.bundle, TEXT, self.threads)

    @cached_property
    def _tokenizer(self) -> Any:
        return _tokenizer(self.bundle)

    @cached_property
    def _unknown(self) -> int | None:
        """Return the id of all unknown words, None where the tokenizer has none (bytes)."""
        model = json.loads(self._tokenizer.to_str())["model"]
        if "unk_id" in model:  # Unigram
            return model["unk_id"]
        return self._tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None

    def load(self, data: bytes, path: str) -> np.ndarray:
        """Decode a photo to the student's size: uint8 (3, H, W).

        Raises:
            ImageError: the bytes are no image that can be read; `path` is named.
        """
        return pixels.load(data, path, self.bundle.preprocess)

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Encode pixels uint8 (B, 3, H, W) → unit rows float32 (B, D)."""
        out = np.empty((len(images), self.dim), np.float32)
        for at in range(0, len(images), self._batch):
            chunk = slice(at, at + self._batch)
            out[chunk] = self._run(IMAGE, {"pixels": images[chunk]})
        return out

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Encode B texts → unit rows float32 (B, D). Texts of similar length share a pass."""
        ids = [encoding.ids for encoding in self._encoded(texts)]
        out = np.empty((len(ids), self.dim), np.float32)
        for rows in by_length(map(len, ids), self._batch):
            out[rows] = self._run(TEXT, self._padded([ids[row] for row in rows]))
        return out

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Count the texts that are cut at the bundle's `max_length`."""
        return sum(bool(encoding.overflowing) for encoding in self._encoded(texts))

    def notes(self, text: str) -> list[str]:
        """Return a sentence for each part of a query that the text tower cannot use."""
        if not text.strip():
            return []
        encoding = self._tokenizer.encode(encodable(text))
        marked = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, strict=True)
        words = [(number, token) for number, token, special in marked if not special]
        notes = []
        # SentencePiece has a token for the space before a word, which is known before any word
        if all(number == self._unknown or token == "\u2581" for number, token in words):
            notes.append("this model knows none of these words")
        if encoding.overflowing:
            notes.append(f"only the first {len(words)} tokens of this query count")
        return notes

    def warm(self) -> None:
        """Run both towers once: the first pass is slower than the others."""
        self.encode_images(np.zeros((1, 3, *self.bundle.preprocess.size), np.uint8))
        self.encode_texts(["a photo"])

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        with artefacts.foreign(self.bundle.folder / TOKENIZER, "not a tokenizer"):
            encodings: list[Any] = self._tokenizer.encode_batch([encodable(text) for text in texts])
            return encodings

    def _run(self, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Run one pass of a tower: float32 (B, D)."""
        session = self._image if name == IMAGE else self._text
        wanted = (len(next(iter(inputs.values()))), self.dim)
        with artefacts.foreign(self.bundle.folder / name, "not a graph that runs here"):
            rows: np.ndarray = session.run(None, inputs)[0]
            if rows.shape != wanted or rows.dtype != np.float32:
                raise ValueError(f"it gives {rows.dtype} {rows.shape}, not float32 {wanted}")
            return rows

    def _padded(self, ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        shape = (len(ids), max(map(len, ids)))
        tokens = np.full(shape, self.bundle.padding, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, text_ids in enumerate(ids):
            tokens[row, : len(text_ids)], mask[row, : len(text_ids)] = text_ids, 1
        return {"input_ids": tokens, "attention_mask": mask}


def runtime() -> Any:
    """Import onnxruntime, with its reports to its makers switched off.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return extras.load("an exported student", "search", "onnxruntime")


def _session(bundle: Bundle, name: str, threads: int) -> Any:
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # what it warns of is its own optimiser's business
    if threads > 1:
        # workers that spin between passes would take the cores from those that decode
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = artefacts.member(bundle.folder, name)
    _check_graph_file(path)
    with artefacts.foreign(path, "not a graph that runs here"):
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _tokenizer(bundle: Bundle) -> Any:
    from tokenizers import Tokenizer

    path = artefacts.member(bundle.folder, TOKENIZER)
    with artefacts.foreign(path, "not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(bundle.max_length)
        return tokenizer


class _Field(NamedTuple):
    """One field of a protobuf message: a number, or the span of its bytes."""

    number: int
    value: int
    start: int
    end: int


def _check_graph_file(path: Path) -> None:
    """Refuse a graph that can run without end, call other code, or read another file.

    A stranger may have made it, and a graph is a program. One without loops, branches and functions
    of its own comes to an end, and one without external data reads no other file. How long a pass
    takes and how much memory is left to the graph: see docs/reliability.md.

    Raises:
        CorruptError: it can, or it is no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for field in _fields(data, 0, len(data)):
                if field.number == _FUNCTIONS:
                    raise ValueError("it has functions of its own")
                if field.number == _GRAPH:
                    _check_graph(data, field)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise CorruptError(
            f"{path}: not a graph as crosstill exports it ({error}); export the student anew"
        ) from None


def _check_graph(data: mmap.mmap, graph: _Field) -> None:
    for field in _fields(data, graph.start, graph.end):
        if field.number == _NODE:
            _check_node(data, field)
        elif field.number == _TENSOR:
            _check_tensor(data, field)
        elif field.number == _SPARSE:
            raise ValueError("it has sparse tensors")


def _check_node(data: mmap.mmap, node: _Field) -> None:
    for field in _fields(data, node.start, node.end):
        if field.number == _DOMAIN:
            domain = data[field.start : field.end].decode()
            if domain not in _DOMAINS:
                raise ValueError(f"it calls {domain[:80]!r}")
        elif field.number == _ATTRIBUTE:
            for part in _fields(data, field.start, field.end):
                if part.number in _GRAPHS:
                    raise ValueError("it has loops or branches")
                if part.number in _SPARSES:
                    raise ValueError("it has sparse tensors")
                if part.number in _TENSORS:
                    _check_tensor(data, part)


def _check_tensor(data: mmap.mmap, tensor: _Field) -> None:
    for field in _fields(data, tensor.start, tensor.end):
        if field.number in _EXTERNAL and (field.value or field.end > field.start):
            raise ValueError("it reads another file")


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[_Field]:
    """Walk over the fields of a message that fills these bytes."""
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        value, start = 0, at
        if kind == 0:
            value, at = _varint(data, at)
            start = at
        elif kind in (1, 5):
            at = start = at + (8 if kind == 1 else 4)
        elif kind == 2:
            length, start = _varint(data, at)
            at = start + length
        else:
            raise ValueError("not protobuf")
        if at > end:
            raise ValueError("cut short")
        yield _Field(number, value, start, at)


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("not protobuf")
