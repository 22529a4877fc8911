"""Which images compete, and what counts as found: the protocols that papers report."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crosstill.errors import DataError, unknown
from crosstill.evaluate.recall import Retrieval, mean, retrieval
from crosstill.evaluate.truth import Truth, checked


def folds(
    image: Tensor, text: Tensor, truth: Truth | Tensor, *, size: int = 1000, count: int = 5
) -> Retrieval:
    """Mean over folds of consecutive images, each with all of its captions.

    Args:
        image: (count * size, D) features in the dataset's order.
        text: (T, D) features of the captions.
        truth: as `crosstill.evaluate.recall.retrieval` takes it; inside a fold only what is
            inside it counts.
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
    results, truth = [], checked(truth, len(image), len(text))
    for start in range(0, len(image), size):
        inside, true = truth.part(start, start + size)
        results.append(retrieval(image[start : start + size], text[inside], true))
    return mean(results)


WHOLE = ("full", "karpathy")  # all images compete, so that a score matrix will do
PROTOCOLS: dict[str, Callable[[Tensor, Tensor, Truth | Tensor], Retrieval]] = {
    "full": retrieval,
    "karpathy": retrieval,
    "coco-1k-5fold": folds,
}


def run(name: str, image: Tensor, text: Tensor, truth: Truth | Tensor) -> Retrieval:
    """Recall by a protocol's name.

    "full": all images compete, and a caption that several of them share is true of each;
    "karpathy": the same, but a caption is true only of the image it was written for;
    "coco-1k-5fold": as "full" in five folds of COCO's 5,000 test images.

    Args:
        name: a key of `PROTOCOLS`.
        image: (I, D) features of the images, in the dataset's order.
        text: (T, D) features of the captions.
        truth: as `crosstill.evaluate.recall.retrieval` takes it.

    Raises:
        ConfigError: no such protocol.
        DataError: the features do not fit together or do not fit the protocol.
    """
    check(name)
    truth = counted(name, checked(truth, len(image), len(text)))
    return PROTOCOLS[name](image, text, truth)


def counted(name: str, truth: Truth) -> Truth:
    """What a protocol counts as true."""
    return truth.plain() if name == "karpathy" else truth


def check(name: str) -> None:
    """Refuse a protocol that does not exist.

    Raises:
        ConfigError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
