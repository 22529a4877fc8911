"""What every loss is: student features, teacher features and ids in, one scalar out."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.types import Features, Hidden, Lists


class Objective(nn.Module):
    """Base of all losses. State, if any, lives in buffers, so `state_dict` is all of it.

    `needs` names the teacher features that the loss reads; a run whose teacher lacks one of
    them refuses at start. `reads` is the noun that it is called with:

        "features"  `Features` of student and teacher, which a cache is enough for
        "masked"    the same, but the student saw photos with a share `ratio` of patches blanked
        "hidden"    `Hidden`, the blocks `layers` of both image towers, one row a distinct photo;
                    needs a teacher that runs beside the student
    """

    needs: frozenset[str] = frozenset({"image", "text"})
    reads: Literal["features", "masked", "hidden"] = "features"
    layers: tuple[str, ...] = ()
    ratio: float = 0.0
    share: float = 1.0  # of a balancer's weight; less for each of several teachers

    # `hardest` negatives of each list are asked of a score cache, by a loss that has `rank`
    ranks: bool = False
    hardest: int = 0

    def meet(self, student: Hidden, teacher: Hidden) -> None:
        """See one photo's layers before training, to learn how wide they are."""

    def forward(self, student: Any, teacher: Any, ids: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (B, D) image and text, or what `reads` says; gradients flow here and
                nowhere else.
            teacher: the same of the same rows.
            ids: (B,) int64, which image each row shows; rows may share one.

        Returns:
            A scalar, finite for finite input.
        """
        raise NotImplementedError

    def rank(self, lists: Lists) -> Tensor:
        """The loss of one batch of candidate lists, as a score cache has them.

        Returns:
            A scalar, finite for finite input.
        """
        raise ConfigError(f"{type(self).__module__}: this loss cannot read a score cache")

    def update(self, teacher: Features, ids: Tensor) -> None:
        """Take note of a batch after its optimizer step; most losses have nothing to note."""
