"""Whether another library gives the rows that the student gives, and by how much not.

Two things are told apart. On equal pixels the rows must agree to the fifth decimal. The other
library also resizes photos itself, through Pillow; there a level of 255 may differ here and there,
which is measured and bounded.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crosstill import images
from crosstill.errors import ExportError
from crosstill.students.student import Student

TOLERANCE = 1e-5  # of an element of unit rows, on equal pixels
LEVELS = 4.0  # of 255, by which a pixel may differ that the other library resized
_SIZES = ((48, 64), (31, 45), (240, 160), (333, 500), (500, 333), (96, 96))
_ODD = ("", " ", "a", "Ünïcode café, naïve", "漢字 и кириллица 🎈", "two dogs\non snow", "a" * 300)


class Stranger(Protocol):
    """An exported folder, loaded by the library that it was written for."""

    def pixels(self, photos: Sequence[Image.Image]) -> Tensor:
        """What its own processor makes of B photos: float32 (B, 3, H, W), normalised."""
        ...

    def images(self, values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) → unit rows (B, D)."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts, by its own tokenizer → unit rows (B, D)."""
        ...


@dataclass(frozen=True)
class Parity:
    """How far an exported folder is from its student.

    Attributes:
        form: what was exported, for messages.
        images: largest difference of an element of unit rows, on equal pixels.
        texts: the same of texts, each library tokenizing for itself.
        levels: largest difference of a pixel, in levels of 255, each library resizing for itself.
        cosine: least cosine of a photo's two rows, each library resizing for itself.
    """

    form: str
    images: float
    texts: float
    levels: float
    cosine: float

    @property
    def holds(self) -> bool:
        """Whether all is within bounds; NaN never is."""
        rows = self.images <= TOLERANCE and self.texts <= TOLERANCE
        return rows and self.levels <= LEVELS

    def __str__(self) -> str:
        return (
            f"{self.form}: rows differ by at most {self.images:.1e} for images and "
            f"{self.texts:.1e} for texts (bound {TOLERANCE:.0e}); pixels resized there differ by "
            f"at most {self.levels:.1f} of 255 (bound {LEVELS:.0f}), cosine {self.cosine:.6f}"
        )

    def require(self) -> None:
        """Raise unless it holds.

        Raises:
            ExportError: something is out of bounds; the message has all figures.
        """
        if not self.holds:
            raise ExportError(f"not exported, it would not give what the student gives: {self}")


def measure(student: Student, stranger: Stranger, form: str) -> Parity:
    """Compare a student with its export on synthetic photos and texts."""
    files = [_png(number, size) for number, size in enumerate(_SIZES)]
    ours = torch.stack([images.load(data, "photo", student.preprocess) for data in files])
    theirs = stranger.pixels([Image.open(io.BytesIO(data)) for data in files]).float()
    values, sentences = images.normalise(ours, student.preprocess), texts(student)
    rows, words = student.embed_images(ours), student.embed_texts(sentences)
    mean, std = torch.tensor((student.preprocess.mean, student.preprocess.std)).view(2, 3, 1, 1)
    cosines = (stranger.images(theirs) * rows).sum(dim=1)
    return Parity(
        form=form,
        images=_largest(stranger.images(values) - rows),
        texts=_largest(stranger.texts(sentences) - words),
        levels=_largest((theirs * std + mean) * 255 - ours),
        cosine=float(cosines.min()),
    )


def texts(student: Student) -> list[str]:
    """Words that the student knows, from one to more than it reads, and odd texts."""
    known = sorted(w for w in student.tokenizer.get_vocab() if w.isalpha()) or ["a"]
    draw, longest = random.Random(0), student.config.max_length
    lengths = (1, 2, 3, 5, 8, 13, longest, 3 * longest)
    return [" ".join(draw.choices(known, k=length)) for length in lengths] + list(_ODD)


def _png(seed: int, size: tuple[int, int]) -> bytes:
    """A photo of soft waves and a little noise, losslessly, so that all decode it equally."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(x / (5 + seed) + band) * np.cos(y / 9 + band) for band in range(3)]
    noise = np.random.default_rng(seed).normal(0, 12, (*size, 3))
    pixels = (127 + 100 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
