"""What a teacher said, on disk: keyed by content, memory-mapped, checksummed, resumable.

A dual encoder leaves features of every row in a `Cache`; a fusion model leaves scores of chosen
pairs in a `ScoreCache`. Features of several dual encoders are joined into one `Cache`.
"""

from crosstill.cache import derived
from crosstill.cache.build import build
from crosstill.cache.joined import join
from crosstill.cache.pixels import PixelStore, pixels
from crosstill.cache.score_build import build_scores
from crosstill.cache.scores import ScoreCache, open
from crosstill.cache.store import Cache, Listing, Split

__all__ = [
    "Cache",
    "Listing",
    "PixelStore",
    "ScoreCache",
    "Split",
    "build",
    "build_scores",
    "derived",
    "join",
    "open",
    "pixels",
]
