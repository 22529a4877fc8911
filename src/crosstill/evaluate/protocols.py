"""Which images compete: the evaluation protocols that papers report."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crosstill.errors import DataError, unknown
from crosstill.evaluate.recall import Retrieval, mean, retrieval


def folds(
    image: Tensor, text: Tensor, owner: Tensor, *, size: int = 1000, count: int = 5
) -> Retrieval:
    """Mean over folds of consecutive images, each with all of its captions.

    Args:
        image: (count * size, D) features in the dataset's order.
        text: (T, D) features of the captions.
        owner: (T,) int64, the row of the image that each caption describes.
        size: images in a fold.
        count: number of folds.

    Raises:
        DataError: there are not count * size images.
    """
    if len(image) != size * count:
        raise DataError(
            f"{count} folds of {size} images need {size * count} images, not {len(image)}; "
            "use the protocol 'full'"
        )
    results = []
    for start in range(0, len(image), size):
        inside = (owner >= start) & (owner < start + size)
        fold = image[start : start + size]
        results.append(retrieval(fold, text[inside], owner[inside] - start))
    return mean(results)


PROTOCOLS: dict[str, Callable[[Tensor, Tensor, Tensor], Retrieval]] = {
    "full": retrieval,
    "coco-1k-5fold": folds,
}


def run(name: str, image: Tensor, text: Tensor, owner: Tensor) -> Retrieval:
    """Recall by a protocol's name: "full", or "coco-1k-5fold" for COCO's 5,000 test images.

    Args:
        name: a key of `PROTOCOLS`.
        image: (I, D) features of the images, in the dataset's order.
        text: (T, D) features of the captions.
        owner: (T,) int64, the row of the image that each caption describes.

    Raises:
        ConfigError: no such protocol.
        DataError: the features do not fit together or do not fit the protocol.
    """
    check(name)
    return PROTOCOLS[name](image, text, owner)


def check(name: str) -> None:
    """Refuse a protocol that does not exist.

    Raises:
        ConfigError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
