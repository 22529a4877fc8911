"""The nouns that the parts of crosstill hand to each other.

Dimension key, used in every shape of this project:
    B  pairs in a batch (Bv photos, Bt texts where they differ)
    D  embedding width       K  queue slots
    N  candidates of a pair    L  tokens of a caption   I  images       T  captions
    C, H, W  channels, height and width of an image
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """One model's view of one batch; row i of image and of text belong to the same pair.

    Only a loss that needs no pairs also gets rows that belong to none, with `Ids` that tell them
    apart; then the sides may differ in length.

    Both are unit length along D, so that a dot product is a cosine similarity; only under
    `normalise = false` they are as the heads, and the teacher, give them. A side that the teacher
    lacks is empty.
    """

    image: Tensor  # (B, D)
    text: Tensor  # (B, D)


class Ids(NamedTuple):
    """The ids of a batch in which photos and texts need not be pairs.

    The pairs come first on both sides: row i of image and of text belong together for i below
    `paired`, and no others do. A caption has the id of its image, a text without a photo one that
    no image has.
    """

    image: Tensor  # (Bv,) int64
    text: Tensor  # (Bt,) int64
    paired: int


class States(NamedTuple):
    """One side's states in a fusion model, which it computes once and uses in every pair.

    Tokens lie along L, whatever a family keeps for each; the real ones come first.
    """

    hidden: Tensor  # (B, L, ...)
    mask: Tensor  # (B, L) int64, 0 where padded

    def take(self, rows: Tensor) -> States:
        """Take rows, cut to the longest of them."""
        mask = self.mask[rows]
        longest = int(mask.sum(1).max()) if len(mask) else 0
        return States(self.hidden[rows, :longest], mask[:, :longest])


class Lists(NamedTuple):
    """Scores of student and teacher on the same candidate lists, N candidates of B queries.

    The lists are named by their queries: "image" for captions of B images, "text" for images of B
    captions. Column 0 is the true partner; the negatives follow, from hard to easy.
    """

    student: dict[str, Tensor]  # (B, N), cosines of a dual encoder, logits of a fusion model
    teacher: dict[str, Tensor]  # (B, N) logits; no entries where there is no teacher
    valid: dict[str, Tensor]  # (B, N) bool; False fills up a list that is shorter than others
    ids: Tensor  # (B,) int64, which image each of the B pairs shows
    features: Features | None  # the student's rows of the B pairs; None from a fusion model


class Hidden(NamedTuple):
    """Outputs of named intermediate layers, for losses that look inside a model."""

    layers: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Example:
    """One image and all of its captions.

    `image_id` is the SHA-256 of the file's bytes, so it survives moving, renaming and touching.
    """

    image_id: str
    path: str  # as the dataset names it, relative to its image folder
    captions: tuple[str, ...]
    split: str  # "train", "val" or "test"


def image_id(data: bytes) -> str:
    """Return the id of an image: the SHA-256 of its file's bytes, in hexadecimal."""
    return sha256(data).hexdigest()


def id_key(image: str) -> int:
    """Return the first 63 bits of an id, which losses compare in place of 64 characters."""
    return int(image[:16], 16) >> 1


def text_key(text: str) -> int:
    """Return the key of a text without an image, which no image has: below -1."""
    return -2 - (int(sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16], 16) >> 2)
