"""What a model card tells: facts alone, without words around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crosstill.preprocess import Preprocess


@dataclass(frozen=True)
class Origin:
    """Something that a student came from: its teacher, its data, one of its towers.

    Attributes:
        name: what to call it.
        licence: as its own card says it, or as it was given; None where nobody said.
        source: a hub id or an address; never a path of this machine.
    """

    name: str
    licence: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Score:
    """One model's recall on one split, in percent.

    Attributes:
        model: such as "student" or "teacher".
        split: such as "test".
        images, captions: how many there are in it.
        i2t: R@1, R@5 and R@10 of images that find captions.
        t2i: the same of captions that find images.
    """

    model: str
    split: str
    images: int
    captions: int
    i2t: tuple[float, float, float]
    t2i: tuple[float, float, float]

    @property
    def rsum(self) -> float:
        """The sum of all six, 0 to 600."""
        return sum(self.i2t) + sum(self.t2i)


@dataclass(frozen=True)
class Rounding:
    """What whole numbers of eight bits cost: RSUM on a split, before and after."""

    split: str
    before: float
    after: float

    @property
    def loss(self) -> float:
        """In percent of what it was; below zero where it grew."""
        return 100 * (self.before - self.after) / self.before if self.before else 0.0


@dataclass(frozen=True)
class Facts:
    """All that a card says of a student.

    Attributes:
        name: of the student.
        parameters: how many each part has, "total" among them.
        dim: D, the width of the joint space.
        max_length: tokens of a text, special ones included.
        preprocess: how it wants its images.
        scores: what was measured, a row each.
        teacher: None for a student that learnt from captions alone.
        data: what it was trained on.
        towers: its pretrained towers, by "image" and "text"; none that began at random.
        command: the line that made it.
        version: of crosstill.
        fingerprint: SHA-256 of all that decides its vectors.
        rounding: what int8 lost, for an int8 export.
    """

    name: str
    parameters: Mapping[str, int]
    dim: int
    max_length: int
    preprocess: Preprocess
    data: Origin
    teacher: Origin | None = None
    towers: Mapping[str, Origin] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    command: str = ""
    version: str = ""
    fingerprint: str = ""
    rounding: Rounding | None = None
