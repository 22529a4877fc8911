"""Which pairs a step sees: a pure function of (seed, epoch, step).

Nothing is skipped to resume and nothing depends on workers or processes: asking for the same
epoch and step gives the same rows.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from crosstill.cache import Split
from crosstill.errors import ConfigError


@dataclass(frozen=True)
class Picked:
    """The rows of one batch, as positions in the split."""

    captions: np.ndarray  # (B,)
    images: np.ndarray  # (B,) the image of each caption
    views: np.ndarray  # (B,) which view of that image


class Sampler:
    """Every caption once an epoch, in groups of `captions_per_image` captions of one image.

    With `steps`, an epoch ends after so many of its steps; the next one draws anew.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        captions_per_image: int,
        seed: int,
        views: int = 1,
        steps: int | None = None,
    ) -> None:
        pairs = len(split.owner)
        if batch_size > pairs:
            raise ConfigError(
                f"batch_size = {batch_size} is more than the {pairs} pairs of split "
                f"{split.name!r}; use --set batch_size={pairs}"
            )
        whole = pairs // batch_size  # the odd rest waits for another epoch's order
        self.steps_per_epoch = min(steps or whole, whole)
        self._split, self._size, self._group = split, batch_size, captions_per_image
        self._seed, self._views = seed, views
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def pick(self, epoch: int, step: int) -> Picked:
        """The rows of one step of one epoch."""
        order, views = self._epoch(epoch)
        captions = order[step * self._size : (step + 1) * self._size]
        images = self._split.owner[captions]
        return Picked(captions, images, views[images])

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All captions in this epoch's order, and this epoch's view of each image."""
        random = np.random.default_rng([self._seed, epoch])
        shuffled = random.permutation(len(self._split.owner))
        by_image = shuffled[np.argsort(self._split.owner[shuffled], kind="stable")]
        owner = self._split.owner[by_image]
        starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
        within = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
        # captions of one group share one random key and so stay together
        opens = within % self._group == 0
        group = np.cumsum(opens) - 1
        key = random.permutation(int(opens.sum()))[group]
        views = random.integers(self._views, size=len(self._split.images))
        return by_image[np.argsort(key, kind="stable")], views
