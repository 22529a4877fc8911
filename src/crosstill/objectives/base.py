"""What every loss is: student features, teacher features and ids in, one scalar out."""

from __future__ import annotations

from torch import Tensor, nn

from crosstill.types import Features


class Objective(nn.Module):
    """Base of all losses. State, if any, lives in buffers, so `state_dict` is all of it.

    `needs` names the teacher features that the loss reads; a run whose teacher lacks one of
    them refuses at start.
    """

    needs: frozenset[str] = frozenset({"image", "text"})

    def forward(self, student: Features, teacher: Features, ids: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            student: (B, D) image and text; gradients flow here and nowhere else.
            teacher: (B, D) image and text of the same rows.
            ids: (B,) int64, which image each row shows; rows may share one.

        Returns:
            A scalar, finite for finite input.
        """
        raise NotImplementedError

    def update(self, teacher: Features, ids: Tensor) -> None:
        """Take note of a batch after its optimizer step; most losses have nothing to note."""
