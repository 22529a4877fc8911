"""The base class of all losses: student features, teacher features and ids in, one scalar out.

A loss declares in its attributes what it has to be given. A run checks them before it starts, and
refuses by name a loss that its cache, its teacher or its student cannot serve:

    needs    which sides of the teacher's features the loss uses
    reads    the input that `forward` is called with
    lists    the candidate lists that `rank` is called with; None for a loss without `rank`
    pairs    whether row i of image and of text have to belong together
    across   whether it compares images with texts, so that it is nothing without one of the two

A loss that needs pairs gets only the pairs of a batch, and is left out of a batch without any. One
that does not gets all rows: as many photos as there are and as many texts, either perhaps none,
and `Ids` in place of a tensor of ids.

A fourth, `apart`, serves a warning: an option, as "margin=0.2", without which the loss, set as it
is, is as small as it can be also where all of the student's rows are alike; "" for other losses.

A class may set them, and so may its constructor where they depend on an option. `declare_like`
copies them all, so that a loss around another one forgets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.objectives.parts import Side, sides
from crosstill.types import Features, Hidden, Ids, Lists

SIDES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


@dataclass(frozen=True)
class Input:
    """The input of a loss, the same for student and teacher.

    Attributes:
        kind: "features" is `Features`, which a cache is enough for; "masked" is the same, but the
            student's photos have a share `ratio` of their patches blanked; "hidden" is `Hidden`,
            the blocks `layers` of both image towers, one row a distinct photo, for which a
            teacher has to run beside the student.
        ratio: share of the patches, of "masked".
        layers: names of blocks, of "hidden".
    """

    kind: Literal["features", "masked", "hidden"] = "features"
    ratio: float = 0.0
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListInput:
    """The candidate lists of a score cache that a loss ranks.

    Attributes:
        hardest: negatives of each list, at most.
        directions: "image" for lists of captions of an image, "text" for the reverse.
    """

    hardest: int
    directions: tuple[str, ...] = ("image", "text")


class Objective(nn.Module):
    """Base of all losses. State, if any, lives in buffers, so `state_dict` is all of it."""

    needs: frozenset[str] = frozenset({"image", "text"})
    reads: Input = Input()
    lists: ListInput | None = None
    pairs: bool = True
    across: bool = False
    apart: str = ""

    def declare_like(self, other: Objective) -> None:
        """Copy every declaration of another loss."""
        self.needs, self.reads, self.lists = other.needs, other.reads, other.lists
        self.pairs, self.across = other.pairs, other.across
        self.apart = other.apart

    def adapt(self, student: Hidden, teacher: Hidden) -> None:
        """Make the parameters that depend on the layers' widths, from one photo's layers."""

    def expect_logits(self) -> None:
        """Drop the parameters that only cosines need: the student is a fusion model."""

    def forward(self, student: Any, teacher: Any, ids: Any) -> Tensor:
        """Compute the loss of one batch.

        Args:
            student: (B, D) image and text, or what `reads` declares; gradients flow here and
                nowhere else.
            teacher: the same of the same rows.
            ids: (B,) int64, which image each row shows; rows may share one. A loss that needs no
                pairs may also get `Ids`.

        Returns:
            A scalar, finite for finite input.
        """
        raise NotImplementedError

    def rank(self, lists: Lists) -> Tensor:
        """Compute the loss of one batch of candidate lists from a score cache.

        Returns:
            A scalar, finite for finite input.
        """
        raise ConfigError(f"{type(self).__module__}: this loss cannot read a score cache")

    def update(self, teacher: Features, ids: Any) -> None:
        """Store a batch's teacher rows after its optimizer step; most losses store nothing."""


class OneSided(Objective):
    """Base of the losses that compare images with images and captions with captions.

    They need no pairs.

    Args:
        side: "both", or "image" or "text" alone, for a teacher that has only that side.
    """

    pairs = False

    def __init__(self, *, side: str = "both") -> None:
        super().__init__()
        if side not in SIDES:
            raise ConfigError(f"side must be one of {', '.join(SIDES)}, not {side!r}")
        self.sides = SIDES[side]
        self.needs = frozenset(self.sides)

    def chosen(self, student: Features, teacher: Features, ids: Tensor | Ids) -> list[Side]:
        """List the chosen sides that have rows."""
        return sides(student, teacher, ids, self.sides)
