"""What a teacher said, on disk: keyed by content, memory-mapped, checksummed, resumable."""

from crosstill.cache import derived
from crosstill.cache.build import build
from crosstill.cache.pixels import PixelStore, pixels
from crosstill.cache.store import Cache, Split

__all__ = ["Cache", "PixelStore", "Split", "build", "derived", "pixels"]
