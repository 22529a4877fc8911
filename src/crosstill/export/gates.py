"""The gates of an export: its rows are the student's, and 8 bits cost little recall.

A folder for another library is compared in two ways (`measure_parity`). On equal pixels the rows
must agree to the fifth decimal. The other library also resizes photos itself, through Pillow; there
a level of 255 may differ here and there, which is measured and bounded. A bundle takes our own
pixels; its rows are compared by cosine (`compare`), and in 8 bits its recall is (`Recalls`).
"""

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
from crosstill.data import Pairs
from crosstill.errors import ExportError
from crosstill.evaluate.recall import Ranking
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher

TOLERANCE = 1e-5  # of an element of unit rows, on equal pixels
LEVELS = 4.0  # of 255, by which a pixel may differ that the other library resized
_SIZES = ((48, 64), (31, 45), (240, 160), (333, 500), (500, 333), (96, 96))
_ODD = ("", " ", "a", "Ünïcode café, naïve", "漢字 и кириллица 🎈", "two dogs\non snow", "a" * 300)
LEAST_COSINE = 0.99999  # between fp32 rows: rounding stays far above it, a lost mask far below
_PROBES = 16


class ReferenceModel(Protocol):
    """An exported folder, loaded by the library that it was written for."""

    def pixels(self, photos: Sequence[Image.Image]) -> Tensor:
        """Resize and normalise B photos by its own processor: float32 (B, 3, H, W)."""
        ...

    def images(self, values: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, H, W) → unit rows (B, D)."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Tokenize and encode B texts → unit rows (B, D)."""
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


def measure_parity(student: Student, reference: ReferenceModel, form: str) -> Parity:
    """Compare a student with its export on synthetic photos and texts."""
    files = [_png(number, size) for number, size in enumerate(_SIZES)]
    ours = torch.stack([images.load(data, "photo", student.preprocess) for data in files])
    prepared = reference.pixels([Image.open(io.BytesIO(data)) for data in files]).float()
    values, sentences = images.normalise(ours, student.preprocess), probe_texts(student)
    rows, words = student.embed_images(ours), student.embed_texts(sentences)
    mean, std = torch.tensor((student.preprocess.mean, student.preprocess.std)).view(2, 3, 1, 1)
    cosines = (reference.images(prepared) * rows).sum(dim=1)
    return Parity(
        form=form,
        images=_largest(reference.images(values) - rows),
        texts=_largest(reference.texts(sentences) - words),
        levels=_largest((prepared * std + mean) * 255 - ours),
        cosine=float(cosines.min()),
    )


def probe_texts(student: Student) -> list[str]:
    """Return texts of words that the student knows, from one to too many, and odd texts."""
    words = sorted(w for w in student.tokenizer.get_vocab() if w.isalpha()) or ["a"]
    draw, longest = random.Random(0), student.config.max_length
    lengths = (1, 2, 3, 5, 8, 13, longest, 3 * longest)
    return [" ".join(draw.choices(words, k=length)) for length in lengths] + list(_ODD)


@dataclass(frozen=True)
class Agreement:
    """How far an export's rows are from the student's.

    Attributes:
        cosine: the least, over all probes of both towers.
        difference: the greatest of a single number of a unit row.
        probes: how many rows were compared.
    """

    cosine: float
    difference: float
    probes: int

    def __str__(self) -> str:
        return (
            f"least cosine {self.cosine:.7f}, greatest difference {self.difference:.1e} "
            f"over {self.probes} rows"
        )

    def require(self, what: str) -> None:
        """Refuse an export whose rows are not the student's.

        Raises:
            ExportError: with the figures.
        """
        if not self.cosine >= LEAST_COSINE:
            raise ExportError(f"{what}: not the student: {self}; at least {LEAST_COSINE} is needed")


def probes(student: Student, pairs: Pairs | None) -> tuple[Tensor, list[str]]:
    """Return pixels (B, 3, H, W) and texts to compare rows on: made ones, and some of the pairs."""
    draw = torch.Generator().manual_seed(0)
    height, width = student.preprocess.size
    noise = torch.randint(0, 256, (4, 3, height, width), generator=draw, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, height * width).view(1, 1, height, width).expand(3, 3, -1, -1)
    plain = torch.stack([torch.full((3, height, width), grey) for grey in (0, 128, 255)])
    made = [*noise, *ramp.to(torch.uint8), *plain.to(torch.uint8)]
    texts = probe_texts(student)
    if pairs is not None:
        for example in pairs.examples[:_PROBES]:
            made.append(images.load(pairs.read(example), example.path, student.preprocess))
            texts += example.captions[:2]
    return torch.stack(made), texts


def compare(student: Student, other: Teacher, pairs: Pairs | None) -> Agreement:
    """Compare both towers' rows, in batches of one and of many, short texts beside long ones."""
    pixels, texts = probes(student, pairs)
    wanted = [student.embed_images(pixels), student.embed_texts(texts)]
    alone = [other.embed_images(pixels[:1]), other.embed_texts(texts[:1])]
    together = [other.embed_images(pixels), other.embed_texts(texts)]
    rows = torch.cat([wanted[0], wanted[1], wanted[0][:1], wanted[1][:1]]).double()
    others = torch.cat([*together, *alone]).double()
    cosine = torch.nn.functional.cosine_similarity(rows, others)
    return Agreement(float(cosine.min()), float((rows - others).abs().max()), len(rows))


@dataclass(frozen=True)
class Recalls:
    """Recall of a student and of its export on the same photos; without pairs their agreement.

    Attributes:
        before, after: the figures in torch, and those of the bundle.
    """

    before: Ranking
    after: Ranking

    @property
    def loss(self) -> float:
        """Return the share of the figure that is lost; negative where it grew."""
        before, after = self.before.value, self.after.value
        return (before - after) / before if before else 0.0

    def __str__(self) -> str:
        return (
            f"{self.before.name} {self.before.value:.2f} in torch, {self.after.value:.2f} exported "
            f"({-self.loss:+.2%})"
        )

    def require(self, most: float) -> None:
        """Refuse 8 bits that cost more than this share of the figure.

        Raises:
            ExportError: with the figures.
        """
        if self.loss > most:
            before, after = self.before.value, self.after.value
            raise ExportError(
                f"int8 loses {self.loss:.2%} of the {self.before.name} ({before:.2f} → "
                f"{after:.2f}), and --max-loss allows {most:.2%}; raise it, or export without "
                "--int8"
            )


def _png(seed: int, size: tuple[int, int]) -> bytes:
    """Render soft waves with a little noise as a PNG, which all libraries decode equally."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [np.sin(x / (5 + seed) + band) * np.cos(y / 9 + band) for band in range(3)]
    noise = np.random.default_rng(seed).normal(0, 12, (*size, 3))
    pixels = (127 + 100 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
