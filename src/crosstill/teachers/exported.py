"""Exported bundles as frozen models: evaluated, timed and cached from like any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from crosstill import bundle as bundles
from crosstill.teachers.base import Kind, unit


def holds(folder: Path) -> bool:
    """Tell whether a folder holds a bundle."""
    return (folder / bundles.RECORD).is_file()


class BundleModel:
    """An exported student, run by onnxruntime on one thread; a `Teacher`.

    Args:
        folder: of the bundle.
        name: what to call it in tables.

    Raises:
        ModelError: half a bundle.
        CorruptError: one of its files was damaged; it is named.
    """

    kind: ClassVar[Kind] = "encoder"
    modalities = frozenset({"image", "text"})

    def __init__(self, folder: Path, name: str) -> None:
        self.bundle = bundles.Bundle.open(folder)
        self.encoder = bundles.Encoder(self.bundle)
        self.name, self.source = name, str(folder.absolute())
        self.dim, self.preprocess = self.bundle.dim, self.bundle.preprocess
        self.licence: str | None = self.bundle.record["licence"]

    def identity(self) -> dict[str, str]:
        """As `Teacher.identity`."""
        return {**self.bundle.identity, "family": "crosstill-bundle"}

    def parameter_count(self) -> int:
        """Count the parameters of the student that was exported."""
        return int(self.bundle.record["parameters"]["total"])

    def embed_images(self, pixels: Tensor) -> Tensor:
        """As `Teacher.embed_images`."""
        return unit(torch.from_numpy(self.encoder.encode_images(pixels.numpy())), self.name)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """As `Teacher.embed_texts`."""
        return unit(torch.from_numpy(self.encoder.encode_texts(texts)), self.name)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """As `Teacher.count_truncated`."""
        return self.encoder.count_truncated(texts)


def load(folder: Path, name: str, device: torch.device | None = None) -> BundleModel:
    """Open a bundle as a frozen model; it runs on the CPU, whatever the device."""
    return BundleModel(folder, name)
