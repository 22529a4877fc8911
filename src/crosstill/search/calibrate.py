"""Calibrate the score threshold of an index on captions of other images.

A search always finds something. How much a score is worth depends on the student and on what the
index holds, so captions that the student has not learnt are searched in it, each without the
photo that it belongs to. What half of them do not reach is a poor score for a query whose photo
is there, and more than a query reaches that has nothing to do with the photos.
"""

from collections.abc import Mapping

import numpy as np

from crosstill.bundle import Bundle, calibration
from crosstill.errors import ConfigError
from crosstill.search.vector_index import VectorIndex

CAPTIONS = 1000  # that are searched at most: enough for a rate of one in a hundred
# Lower, and captions of photos much like those of the index would find nothing: see docs/search.md.
RATE = 0.5
STEPS = 200  # between the quantiles that are kept


def quantiles(
    bundle: Bundle, vectors: VectorIndex, numbers: Mapping[bytes, int]
) -> list[float] | None:
    """Compute quantiles of the best score of each caption among photos that are not its own.

    Args:
        bundle: holds the captions.
        vectors: to search in.
        numbers: of the photos in the index, by the SHA-256 of their bytes.

    Returns:
        `STEPS` + 1 scores from the lowest to the highest; None without captions or other photos.
    """
    captions = calibration(bundle)
    if captions is None:
        return None
    rows, images = captions
    some = np.linspace(0, len(rows) - 1, min(len(rows), CAPTIONS)).astype(int)
    own = np.array([numbers.get(bytes.fromhex(images[row]), -2) for row in some])
    scores, ids = vectors.search(rows[some], 2)
    best = np.where(ids[:, 0] == own, scores[:, 1], scores[:, 0])
    best = best[np.isfinite(best)]
    if not len(best):
        return None
    levels = np.quantile(best, np.linspace(0, 1, STEPS + 1))
    return [round(float(score), 6) for score in levels]


def threshold(levels: list[float] | None, rate: float) -> float:
    """Return the score that only this share of the captions reaches.

    Raises:
        ConfigError: nothing was calibrated, or the rate is not between 0 and 1.
    """
    if levels is None:
        raise ConfigError(
            "this index has no calibrated threshold, since its bundle holds no captions to "
            "calibrate on; give a score, or export the bundle with its data"
        )
    if not 0 < rate < 1:
        raise ConfigError(f"rate {rate}: give a share between 0 and 1")
    return float(np.interp(1 - rate, np.linspace(0, 1, len(levels)), levels))
