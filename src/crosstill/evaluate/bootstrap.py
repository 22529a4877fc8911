"""Paired bootstrap: is one model better than another, or did chance choose the queries?

Both models answer the same queries, so that the pair of their answers is resampled. The unit is the
image with all of its captions, since five captions of one photo are no five independent queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosstill.errors import DataError

DRAWS = 10_000
FEWEST = 30  # images below which the percentiles of a bootstrap mean little
_BLOCK = 500  # draws at a time


@dataclass(frozen=True)
class Answers:
    """The success of each query of a split, averaged over seeds where there are several.

    Attributes:
        image: (I, 3) chance in 0..1 that image i finds one of its captions among 1, 5 and 10.
        text: (T, 3) the same for captions that look for their image.
        owner: (T,) int64, the image of each caption.
    """

    image: Tensor
    text: Tensor
    owner: Tensor

    @property
    def rsum(self) -> float:
        """RSUM of these answers, 0 to 600."""
        return 100 * float(self.image.mean(0).sum() + self.text.mean(0).sum())


@dataclass(frozen=True)
class Difference:
    """RSUM of one model less that of another.

    Attributes:
        rsum: the difference measured.
        low: lower end of the 95 % interval over resampled images.
        high: upper end of it.
        p: two-sided; how often a resample crosses zero, doubled, 1 at most.
    """

    rsum: float
    low: float
    high: float
    p: float


def average(answers: Sequence[Answers]) -> Answers:
    """Average the answers of several seeds to the same queries."""
    image = torch.stack([a.image for a in answers]).double().mean(0)
    text = torch.stack([a.text for a in answers]).double().mean(0)
    return Answers(image, text, answers[0].owner)


def paired(a: Answers, b: Answers, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Model a less model b, with what resampling the images makes of it.

    Raises:
        DataError: the queries differ, or there are too few images.
    """
    if not torch.equal(a.owner, b.owner) or a.image.shape != b.image.shape:
        raise DataError("the two models answered different queries; evaluate them on one split")
    count = len(a.image)
    if count < FEWEST:
        raise DataError(f"{count} images are too few for a bootstrap; give it {FEWEST} or more")
    # per image: its own gain, its captions' summed gain, its number of captions
    own = (a.image - b.image).double().sum(1)
    gains = torch.zeros(count, dtype=torch.float64)
    gains.index_add_(0, a.owner, (a.text - b.text).double().sum(1))
    captions = a.owner.bincount(minlength=count).double()
    rows = torch.stack([own, gains, captions], dim=1)
    blocks = [min(_BLOCK, draws - start) for start in range(0, draws, _BLOCK)]
    sums = torch.cat([_resample(rows, n, seed + i) for i, n in enumerate(blocks)])
    means = 100 * (sums[:, 0] / count + sums[:, 1] / sums[:, 2])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # one added to both counts, so that no p is 0
    below, above = (1 + (means <= 0).sum()), (1 + (means >= 0).sum())
    p = min(1.0, 2 * float(torch.minimum(below, above)) / (draws + 1))
    return Difference(a.rsum - b.rsum, low, high, p)


def _resample(rows: Tensor, draws: int, seed: int) -> Tensor:
    """Sum (draws, 3) rows (I, 3) drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(rows), (draws, len(rows)), generator=generator)
    return rows[picked].sum(1)
