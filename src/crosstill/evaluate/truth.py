"""True pairs: the images and captions that belong together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosstill.errors import DataError


class Truth:
    """The true pairs of I images and T captions: a caption is true of all images that have it.

    Pairs are made image by image when they are asked for: where thousands of images share one
    caption, all of them would not fit into memory.

    Args:
        owner: (T,) int64, the image that each caption was written for.
        group: (T,) int64, equal for equal captions; None: each is true of its owner alone.
    """

    def __init__(self, owner: Tensor, group: Tensor | None = None) -> None:
        count = len(owner)
        numbers = torch.arange(count, device=owner.device) if group is None else group
        self.owner, self.group = owner, numbers.unique(return_inverse=True)[1]
        written = (
            owner * count + self.group
        ).unique()  # each group once an image, images ascending
        self._image, self._said = written // max(1, count), written % max(1, count)
        self._order = self.group.argsort(stable=True)
        self._size = self.group.bincount()
        self._first = self._size.cumsum(0) - self._size

    @property
    def shared(self) -> int:
        """Count the captions that are true of several images."""
        return int((self._said.bincount() > 1)[self.group].sum())

    def pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """List the true pairs of images `start` to `stop`: (P,) images, (P,) captions."""
        ends = torch.searchsorted(self._image, self._image.new_tensor([start, stop]))
        written = self._said[slice(*ends.tolist())]
        size = self._size[written]
        inside = torch.arange(int(size.sum()), device=size.device)
        skipped = (self._first[written] - size.cumsum(0) + size).repeat_interleave(size)
        image = self._image[slice(*ends.tolist())].repeat_interleave(size)
        return image, self._order[inside + skipped]

    def plain(self) -> Truth:
        """Return the truth in which each caption is true of its own image alone."""
        return Truth(self.owner)

    def part(self, start: int, stop: int) -> tuple[Tensor, Truth]:
        """Keep images `start` to `stop`: (T,) bool of their captions, and the truth among them."""
        inside = (self.owner >= start) & (self.owner < stop)
        return inside, Truth(self.owner[inside] - start, self.group[inside])

    def to(self, device: torch.device) -> Truth:
        """Move to a device."""
        here = device == self.owner.device
        return self if here else Truth(self.owner.to(device), self.group.to(device))


def of_texts(owner: Tensor, texts: Sequence[str]) -> Truth:
    """Make the truth in which a caption is true of every image that has the very same one.

    Args:
        owner: (T,) int64, the image that each caption was written for.
        texts: the T captions.
    """
    numbers: dict[str, int] = {}
    group = [numbers.setdefault(text, len(numbers)) for text in texts]
    return Truth(owner, torch.tensor(group, dtype=torch.int64))


def checked(truth: Truth | Tensor, images: int, captions: int) -> Truth:
    """Check a truth, or make one of owners, against the numbers of images and captions.

    Raises:
        DataError: owners do not fit the captions or the images, or an image has no caption.
    """
    owner = truth if isinstance(truth, Tensor) else truth.owner
    if len(owner) != captions:
        raise DataError(f"{captions} captions, but {len(owner)} say which image they describe")
    if not captions or int(owner.min()) < 0 or int(owner.max()) >= images:
        raise DataError(f"each caption must describe one of the {images} images")
    counts = owner.bincount(minlength=images)
    if not counts.all():
        raise DataError(
            f"{int((counts == 0).sum())} of {images} images have no caption, first image "
            f"{int(counts.argmin())}; leave them out"
        )
    return Truth(truth) if isinstance(truth, Tensor) else truth
