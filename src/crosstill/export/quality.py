"""What an export must keep of a student: its vectors, and in 8 bits its recall."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosstill import images
from crosstill.data import Pairs
from crosstill.errors import ExportError
from crosstill.evaluate import embed
from crosstill.evaluate.encode import Embedded
from crosstill.evaluate.report import Evaluation, judge
from crosstill.export import parity
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher

LEAST_COSINE = 0.99999  # between fp32 rows: rounding stays far above it, a lost mask far below
_PROBES = 16


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


def probes(student: Student, pairs: Pairs | None) -> tuple[Tensor, list[str]]:
    """Pixels (B, 3, H, W) and texts to compare rows on: made ones, and real ones if at hand."""
    draw = torch.Generator().manual_seed(0)
    height, width = student.preprocess.size
    noise = torch.randint(0, 256, (4, 3, height, width), generator=draw, dtype=torch.uint8)
    ramp = torch.linspace(0, 255, height * width).view(1, 1, height, width).expand(3, 3, -1, -1)
    plain = torch.stack([torch.full((3, height, width), grey) for grey in (0, 128, 255)])
    made = [*noise, *ramp.to(torch.uint8), *plain.to(torch.uint8)]
    texts = parity.texts(student)
    if pairs is not None:
        for example in pairs.examples[:_PROBES]:
            made.append(images.load(pairs.read(example), example.path, student.preprocess))
            texts += example.captions[:2]
    return torch.stack(made), texts


def compare(student: Student, other: Teacher, pairs: Pairs | None) -> Agreement:
    """Compare both towers' rows; batches of one and of many, short texts beside long ones."""
    pixels, texts = probes(student, pairs)
    wanted = [student.embed_images(pixels), student.embed_texts(texts)]
    alone = [other.embed_images(pixels[:1]), other.embed_texts(texts[:1])]
    found = [other.embed_images(pixels), other.embed_texts(texts)]
    ours = torch.cat([wanted[0], wanted[1], wanted[0][:1], wanted[1][:1]]).double()
    theirs = torch.cat([*found, *alone]).double()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs)
    return Agreement(float(cosine.min()), float((ours - theirs).abs().max()), len(ours))


def hold(found: Agreement, what: str) -> Agreement:
    """Refuse an export whose rows are not the student's.

    Raises:
        ExportError: with the figures.
    """
    if not found.cosine >= LEAST_COSINE:
        raise ExportError(f"{what}: not the student: {found}; at least {LEAST_COSINE} is needed")
    return found


@dataclass(frozen=True)
class Measured:
    """A student and its export on the same photos.

    Attributes:
        before, after: recall in torch, and of the bundle.
        seen: the bundle's rows.
    """

    before: Evaluation
    after: Evaluation
    seen: Embedded

    @property
    def loss(self) -> float:
        """The share of the RSUM that is gone; negative where there is more."""
        before, after = self.before.recall.rsum, self.after.recall.rsum
        return (before - after) / before if before else 0.0


def measure(student: Student, other: Teacher, pairs: Pairs) -> Measured:
    """Recall of both on photos that the student has not learnt."""
    before, seen = judge(student, embed(student, pairs)), embed(other, pairs)
    return Measured(before, judge(other, seen), seen)


def keep(found: Measured, most: float) -> Measured:
    """Refuse 8 bits that cost too much.

    Args:
        found: what was measured.
        most: the share of the RSUM that may be lost.

    Raises:
        ExportError: with the figures.
    """
    if found.loss > most:
        before, after = found.before.recall.rsum, found.after.recall.rsum
        raise ExportError(
            f"int8 loses {found.loss:.2%} of the RSUM ({before:.2f} → {after:.2f}), "
            f"and --max-loss allows {most:.2%}; raise it, or export without --int8"
        )
    return found


def calibrate(seen: Embedded, path: Path, most: int = 1000) -> None:
    """Write rows of captions, evenly drawn, with the ids of their photos: `search.calibrate`."""
    count = min(most, len(seen.text))
    chosen = torch.linspace(0, len(seen.text) - 1, count).round().long()
    owners = [seen.image_ids[row] for row in seen.owner[chosen].tolist()]
    rows = seen.text[chosen].numpy().astype(np.float16)
    np.savez(path, rows=rows, images=np.array(owners, "S64"))
