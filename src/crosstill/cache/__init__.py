"""A teacher's outputs on disk: keyed by content, memory-mapped, checksummed, resumable.

A dual encoder leaves features of every row in a `Cache`; a fusion model leaves scores of chosen
pairs in a `ScoreCache`. Features of several dual encoders are joined into one `Cache`.
"""

from crosstill.cache import memo
from crosstill.cache.build import build
from crosstill.cache.format import Cache, CacheBase, Split, is_cache, open
from crosstill.cache.joined import join
from crosstill.cache.memo import PixelStore, pixels
from crosstill.cache.score_build import build_scores
from crosstill.cache.scores import ScoreCache

__all__ = [
    "Cache",
    "CacheBase",
    "PixelStore",
    "ScoreCache",
    "Split",
    "build",
    "build_scores",
    "is_cache",
    "join",
    "memo",
    "open",
    "pixels",
]
