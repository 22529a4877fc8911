"""A bundle whose towers are a few lines of numpy: for tests in which the model does not matter."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosstill import bundle as bundles
from crosstill import files, pixels
from crosstill.bundle import Bundle
from crosstill.pixels import Preprocess

DIM = 48
PREPROCESS = Preprocess(size=(4, 4))


def photo(seed: int) -> bytes:
    """A photo of 4 x 4 pixels, another for each seed."""
    return b"P6 4 4 255\n" + np.random.default_rng(seed).bytes(DIM)


def put(root: Path, **seeds: int) -> None:
    """Write photos named `NAME.ppm`; a name may hold folders, with __ for the slash."""
    for name, seed in seeds.items():
        path = root / f"{name.replace('__', '/')}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(seed))


def row(seed: int) -> np.ndarray:
    """The unit vector of a photo."""
    values = np.random.default_rng(seed).bytes(DIM)
    found = np.frombuffer(values, np.uint8).astype(np.float32) - 127.5
    return found / np.linalg.norm(found)


def sha(seed: int) -> str:
    return hashlib.sha256(photo(seed)).hexdigest()


def bundle(folder: Path, weights: str = "first", captions: Sequence[int] | None = None) -> Path:
    """Write the bundle; `captions` are seeds of photos: each has a caption with its very vector."""
    folder.mkdir(parents=True)
    for name in (bundles.IMAGE, bundles.TEXT, bundles.TOKENIZER, "README.md"):
        (folder / name).write_text(f"{name} of {weights}")
    if captions is not None:
        rows = np.stack([row(seed) for seed in captions])
        images = np.array([sha(seed).encode() for seed in captions])
        np.savez(folder / bundles.CALIBRATION, rows=rows, images=images)
    record = {
        "format": bundles.FORMAT,
        "name": "fake",
        "dim": DIM,
        "precision": "fp32",
        "max_length": 8,
        "padding": 0,
        "preprocess": PREPROCESS.to_json(),
        "identity": {
            "weights": weights,
            "preprocess": PREPROCESS.digest(),
            "tokenizer": "t",
            "activation": "none",
            "precision": "fp32",
        },
        "files": {path.name: files.digest_file(path) for path in folder.iterdir()},
    }
    files.write_json(folder / bundles.RECORD, files.sealed(record))
    return folder


class FakeEncoder:
    """A photo's vector is its pixels; a text's is that of the photo whose seed it names."""

    encoded = 0  # photos, of all encoders since it was last set to 0

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self.bundle, self.dim = bundle, DIM

    def load(self, data: bytes, path: str) -> np.ndarray:
        return pixels.load(data, path, PREPROCESS)

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        FakeEncoder.encoded += len(images)
        flat = images.transpose(0, 2, 3, 1).reshape(len(images), -1).astype(np.float32) - 127.5
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([row(int(text)) if text.isdigit() else row(0) for text in texts])

    def notes(self, text: str) -> list[str]:
        return []

    def warm(self) -> None:
        pass
