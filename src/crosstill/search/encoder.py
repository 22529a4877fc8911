"""Photos and texts to vectors with onnxruntime: what training would give, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from crosstill import artefacts, pixels
from crosstill.errors import ConfigError
from crosstill.search import bundle as bundles
from crosstill.search import onnx_files
from crosstill.search.bundle import Bundle

BATCH = 32  # items of a pass: more gains nothing on a CPU and holds memory


class Encoder:
    """A bundle's two towers, each loaded when it is first used. Several threads may share one.

    Args:
        bundle: what to run.
        threads: that one pass may use.

    Whatever loads a tower may raise a ConfigError (onnxruntime is not installed) or a CorruptError
    (a graph or the tokenizer cannot be read).
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self.bundle, self.dim, self.threads = bundle, bundle.dim, threads
        # 8-bit activations share one scale a pass: beside others an item would get other vectors
        self._batch = 1 if bundle.precision == "int8" else BATCH

    @cached_property
    def _image(self) -> Any:
        return _session(self.bundle, bundles.IMAGE, self.threads)

    @cached_property
    def _text(self) -> Any:
        return _session(self.bundle, bundles.TEXT, self.threads)

    @cached_property
    def _tokenizer(self) -> Any:
        return _tokenizer(self.bundle)

    @cached_property
    def _unknown(self) -> int | None:
        """The id that all unknown words get; None where there is none, as among bytes."""
        model = json.loads(self._tokenizer.to_str())["model"]
        if "unk_id" in model:  # Unigram
            return model["unk_id"]
        return self._tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None

    def load(self, data: bytes, path: str) -> np.ndarray:
        """A file's bytes → pixels as the student wants them: uint8 (3, H, W).

        Raises:
            ImageError: the bytes are no image that can be read; `path` is named.
        """
        return pixels.load(data, path, self.bundle.preprocess)

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Pixels uint8 (B, 3, H, W) → unit rows float32 (B, D)."""
        chunks = [images[at : at + self._batch] for at in range(0, len(images), self._batch)]
        return self._rows([self._run(bundles.IMAGE, {"pixels": chunk}) for chunk in chunks])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """B texts → unit rows float32 (B, D). Texts of similar length share a pass."""
        ids = [encoding.ids for encoding in self._encoded(texts)]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        out = np.empty((len(ids), self.dim), np.float32)
        for at in range(0, len(order), self._batch):
            rows = order[at : at + self._batch]
            out[rows] = self._run(bundles.TEXT, self._padded([ids[row] for row in rows]))
        return out

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are cut at the bundle's `max_length`."""
        return sum(bool(encoding.overflowing) for encoding in self._encoded(texts))

    def notes(self, text: str) -> list[str]:
        """Say, a sentence each, what of a query the text tower cannot use; of most, nothing."""
        if not text.strip():
            return []
        encoding = self._tokenizer.encode(*_encodable([text]))
        masked = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, strict=True)
        words = [(number, token) for number, token, special in masked if not special]
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
        with artefacts.foreign(self.bundle.folder / bundles.TOKENIZER, "not a tokenizer"):
            encodings: list[Any] = self._tokenizer.encode_batch(_encodable(texts))
            return encodings

    def _run(self, name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Run one pass of a tower: float32 (B, D)."""
        session = self._image if name == bundles.IMAGE else self._text
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
        for row, known in enumerate(ids):
            tokens[row, : len(known)], mask[row, : len(known)] = known, 1
        return {"input_ids": tokens, "attention_mask": mask}

    def _rows(self, chunks: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(chunks) if chunks else np.empty((0, self.dim), np.float32)


def _encodable(texts: Sequence[str]) -> list[str]:
    """Lone surrogates, as in odd file names, cannot be tokenized; they become question marks."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def runtime() -> Any:
    """The module onnxruntime, kept from reporting its use to its makers.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("onnxruntime is not installed; pip install 'crosstill[search]'") from None
    return onnxruntime


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
    onnx_files.check(path)
    with artefacts.foreign(path, "not a graph that runs here"):
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _tokenizer(bundle: Bundle) -> Any:
    from tokenizers import Tokenizer

    path = artefacts.member(bundle.folder, bundles.TOKENIZER)
    with artefacts.foreign(path, "not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(bundle.max_length)
        return tokenizer
