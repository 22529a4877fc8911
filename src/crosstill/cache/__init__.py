"""A teacher's outputs on disk: keyed by content, memory-mapped, checksummed, resumable.

A dual encoder leaves features of every row in a `Cache`; features of several dual encoders are
joined into one `Cache`. `crosstill.fusion` has the caches of a fusion model's scores.
"""

from crosstill.cache import memo
from crosstill.cache.feature_build import build
from crosstill.cache.format import Cache, CacheBase, Split, is_cache, open
from crosstill.cache.joined import join
from crosstill.cache.memo import PixelStore, pixels

__all__ = [
    "Cache",
    "CacheBase",
    "PixelStore",
    "Split",
    "build",
    "is_cache",
    "join",
    "memo",
    "open",
    "pixels",
]
