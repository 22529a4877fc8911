"""Recall@K of image-text retrieval, as pure functions, and the protocols that papers report.

A query counts at K when one of its true partners is among the K best-scored candidates: for an
image any of its captions, for a caption its image, and where a `Truth` says that several images
share it, any of these. Scores are float32, whatever the model ran in: bfloat16 makes ties that
move R@1 by several tenths of a point.

Tied candidates have no order, so recall is what a random order would give on average, in closed
form; the best and the worst order are reported as bounds. (Counting only strictly better
candidates would give a collapsed model, whose scores are all the same, 100 %.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from crosstill.errors import DataError, unknown
from crosstill.evaluate.truth import Truth, checked

DEPTHS = (1, 5, 10)
DOUBT = 0.1  # points between the bounds from which the numbers carry a warning
KEPT = 2**30  # bytes of scores that are kept between the two passes, not computed twice
LARGEST = torch.finfo(torch.float32).max
BLOCK = 2**24  # scores that are looked at together


class Percent(NamedTuple):
    """Recall at the three depths, 0 to 100."""

    r1: float
    r5: float
    r10: float


@dataclass(frozen=True)
class Recall:
    """Recall of one direction, with ties in random order, in the best order, in the worst."""

    fair: Percent
    optimistic: Percent
    pessimistic: Percent

    @property
    def r1(self) -> float:
        return self.fair.r1

    @property
    def r5(self) -> float:
        return self.fair.r5

    @property
    def r10(self) -> float:
        return self.fair.r10


class Ranking(Protocol):
    """How well a model ranks: by the captions (`Retrieval`) or by its teacher (`Agreement`).

    Attributes:
        name: of the figure that a student is chosen by, for people.
        key: its name in JSON.
    """

    name: ClassVar[str]
    key: ClassVar[str]

    @property
    def images(self) -> int:
        """Number of photos."""

    @property
    def captions(self) -> int:
        """Number of texts."""

    @property
    def shared(self) -> int:
        """Captions that count as true of several images."""

    @property
    def value(self) -> float:
        """The figure that a student is chosen by; higher is better."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Headings of `figures`."""

    @property
    def figures(self) -> tuple[float, ...]:
        """All figures, `value` last."""

    @property
    def warning(self) -> str | None:
        """One line when the figures are doubtful."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""


@dataclass(frozen=True)
class Retrieval:
    """Recall of both directions: images finding captions (i2t), captions finding images (t2i).

    `shared` captions count as true of several images.
    """

    i2t: Recall
    t2i: Recall
    images: int
    captions: int
    shared: int = 0

    name: ClassVar[str] = "RSUM"
    key: ClassVar[str] = "rsum"
    heads: ClassVar[tuple[str, ...]] = (
        "image→text R@1",
        "R@5",
        "R@10",
        "text→image R@1",
        "R@5",
        "R@10",
        "RSUM",
    )

    @property
    def value(self) -> float:
        """As `rsum`."""
        return self.rsum

    @property
    def figures(self) -> tuple[float, ...]:
        """The six recalls, and their sum."""
        return *self.i2t.fair, *self.t2i.fair, self.rsum

    @property
    def rsum(self) -> float:
        """The sum of all six recalls, 0 to 600."""
        return sum(self.i2t.fair) + sum(self.t2i.fair)

    @property
    def warning(self) -> str | None:
        """One line when ties make the numbers doubtful."""
        both = self.i2t, self.t2i
        gaps = [a - b for r in both for a, b in zip(r.optimistic, r.pessimistic, strict=True)]
        if max(gaps) <= DOUBT:
            return None
        return (
            f"tied scores leave up to {max(gaps):.1f} points of recall to chance; the values "
            "are averages over random order (collapsed or low-precision features?)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: i2t, t2i (r1, r5, r10), rsum, three counts, bounds, warning."""
        directions = {"i2t": self.i2t, "t2i": self.t2i}
        return {
            **{name: recall.fair._asdict() for name, recall in directions.items()},
            "rsum": self.rsum,
            "images": self.images,
            "captions": self.captions,
            "shared_captions": self.shared,
            "bounds": {
                "optimistic": {k: r.optimistic._asdict() for k, r in directions.items()},
                "pessimistic": {k: r.pessimistic._asdict() for k, r in directions.items()},
            },
            "warning": self.warning,
        }


class Rivals(NamedTuple):
    """The place of each of Q queries among its wrong candidates; float64 counts, (Q,) each."""

    better: Tensor  # wrong candidates scored above the query's best true partner
    level: Tensor  # wrong candidates scored the same as it
    true: Tensor  # true partners that share that score


def retrieval(image: Tensor, text: Tensor, truth: Truth | Tensor) -> Retrieval:
    """Measure the recall of features, by dot product.

    Two images with two captions each. Rows of the scores are images, columns captions. Image 0
    finds its caption 0 first (0.9). Image 1 finds caption 1 first (0.8), which is image 0's, and
    its own caption 2 second (0.6): at 1 one of two images is right, at 5 both. Captions 0, 2 and 3
    find their image first, caption 1 finds the other one: at 1 three of four are right.

    >>> image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> text = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.6], [0.4, 0.5]])
    >>> image @ text.T
    tensor([[0.9000, 0.2000, 0.3000, 0.4000],
            [0.1000, 0.8000, 0.6000, 0.5000]])
    >>> result = retrieval(image, text, torch.tensor([0, 0, 1, 1]))
    >>> result.i2t.fair, result.t2i.fair
    (Percent(r1=50.0, r5=100.0, r10=100.0), Percent(r1=75.0, r5=100.0, r10=100.0))
    >>> result.rsum
    525.0

    Args:
        image: (I, D) features of the images.
        text: (T, D) features of the captions.
        truth: which belong together, or (T,) int64, the one image that each caption describes.

    Raises:
        DataError: shapes do not fit, a feature is not finite, or an image has no caption.
    """
    image, text, truth = _checked(image, text, truth)
    if len(image) * len(text) * 4 <= KEPT:
        return _retrieval((image @ text.T).__getitem__, truth, len(image))
    return _retrieval(lambda rows: image[rows] @ text.T, truth, len(image))


def chances(image: Tensor, text: Tensor, truth: Truth | Tensor) -> tuple[Tensor, Tensor]:
    """Compute each query's chance, 0 to 1, to find a true partner among 1, 5 and 10.

    Args and errors are those of `retrieval`, whose recalls are 100 times the means of these.

    Returns:
        (I, 3) of the images, (T, 3) of the captions; float64.
    """
    image, text, truth = _checked(image, text, truth)
    return _chances(lambda rows: image[rows] @ text.T, truth, len(image))


def from_scores(scores: Tensor, truth: Truth | Tensor) -> Retrieval:
    """Measure the recall of a score matrix, such as a fusion model's.

    Args:
        scores: (I, T), higher is better.
        truth: which belong together, or (T,) int64, the one image that each caption describes.

    Raises:
        DataError: shapes do not fit, a score is NaN, or an image has no caption.
    """
    scores, truth = _checked_scores(scores, truth)
    return _retrieval(scores.__getitem__, truth, len(scores))


def chances_of_scores(scores: Tensor, truth: Truth | Tensor) -> tuple[Tensor, Tensor]:
    """Compute `chances` of a score matrix; args and errors are those of `from_scores`."""
    scores, truth = _checked_scores(scores, truth)
    return _chances(scores.__getitem__, truth, len(scores))


def mean(results: Sequence[Retrieval]) -> Retrieval:
    """Average several retrievals; images and captions are their sums."""

    def average(parts: list[Percent]) -> Percent:
        return Percent(*(sum(values) / len(parts) for values in zip(*parts, strict=True)))

    def direction(parts: list[Recall]) -> Recall:
        return Recall(
            average([p.fair for p in parts]),
            average([p.optimistic for p in parts]),
            average([p.pessimistic for p in parts]),
        )

    return Retrieval(
        direction([r.i2t for r in results]),
        direction([r.t2i for r in results]),
        images=sum(r.images for r in results),
        captions=sum(r.captions for r in results),
        shared=sum(r.shared for r in results),
    )


def folds(
    image: Tensor, text: Tensor, truth: Truth | Tensor, *, size: int = 1000, count: int = 5
) -> Retrieval:
    """Average recall over folds of consecutive images, each with all of its captions.

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


def by_protocol(name: str, image: Tensor, text: Tensor, truth: Truth | Tensor) -> Retrieval:
    """Measure recall by a protocol that papers report.

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
    check_protocol(name)
    truth = protocol_truth(name, checked(truth, len(image), len(text)))
    return PROTOCOLS[name](image, text, truth)


def protocol_truth(name: str, truth: Truth) -> Truth:
    """Return what a protocol counts as true."""
    return truth.plain() if name == "karpathy" else truth


def check_protocol(name: str) -> None:
    """Refuse a protocol that does not exist.

    Raises:
        ConfigError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)


Scores = Callable[[slice], Tensor]  # some images' rows of the score matrix


class Block(NamedTuple):
    """The scores of consecutive images against all captions."""

    rows: slice
    scores: Tensor  # (b, T)
    true: tuple[Tensor, Tensor]  # where image and caption belong together

    @property
    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """The image, the caption and the score of every true pair in it."""
        return self.true[0] + self.rows.start, self.true[1], self.scores[self.true]


def _retrieval(scores: Scores, truth: Truth, images: int) -> Retrieval:
    image, text = _rivals(scores, truth, images)
    recalls = _recall(image), _recall(text)
    return Retrieval(*recalls, images=images, captions=len(truth.owner), shared=truth.shared)


def _chances(scores: Scores, truth: Truth, images: int) -> tuple[Tensor, Tensor]:
    of_image, of_text = (
        torch.stack([chance(side, depth) for depth in DEPTHS], dim=1)
        for side in _rivals(scores, truth, images)
    )
    return of_image, of_text


def _rivals(scores: Scores, truth: Truth, images: int) -> tuple[Rivals, Rivals]:
    """Count the wrong candidates of every image and of every caption."""
    counts = images, len(truth.owner)
    # of each query: wrong ones above its best true one, wrong ones at least as high, true as high
    of_image, of_text = (truth.owner.new_zeros(3, n, dtype=torch.float32) for n in counts)
    best, best_text = (of_one[0] - torch.inf for of_one in (of_image, of_text))
    for block in _blocks(scores, truth, images):
        image, text, own = block.own
        best.scatter_reduce_(0, image, own, "amax")
        best_text.scatter_reduce_(0, text, own, "amax")
    for block in _blocks(scores, truth, images):
        image, text, own = block.own
        of_image[2].index_add_(0, image, (own == best[image]).float())
        of_text[2].index_add_(0, text, (own == best_text[text]).float())
        flags = torch.empty_like(block.scores)
        for i, compare in enumerate((torch.gt, torch.ge)):
            compare(block.scores, best[block.rows, None], out=flags)[block.true] = 0
            of_image[i, block.rows] = flags.sum(1)
            compare(block.scores, best_text, out=flags)[block.true] = 0
            of_text[i] += flags.sum(0)
    return _settle(of_image), _settle(of_text)


def _blocks(scores: Scores, truth: Truth, images: int) -> Iterator[Block]:
    step = max(1, BLOCK // len(truth.owner))
    for start in range(0, images, step):
        stop = min(start + step, images)
        image, text = truth.pairs(start, stop)
        yield Block(slice(start, stop), scores(slice(start, stop)), (image - start, text))


def _settle(counts: Tensor) -> Rivals:
    above, at_least, true = counts.double()
    return Rivals(above, at_least - above, true)


def _recall(rivals: Rivals) -> Recall:
    behind = rivals.better + rivals.level  # where the worst order puts the best true partner
    return Recall(
        _percent(chance(rivals, depth) for depth in DEPTHS),
        _percent((rivals.better < depth).double() for depth in DEPTHS),
        _percent((behind < depth).double() for depth in DEPTHS),
    )


def _percent(chances: Iterable[Tensor]) -> Percent:
    return Percent(*(float(chance.mean()) * 100 for chance in chances))


def chance(rivals: Rivals, depth: int) -> Tensor:
    """Compute how likely each query has a true partner among its first `depth`, in random order.

    Of the level + true tied candidates, k = depth - better are placed, one after the other;
    what this adds up to is 1 - C(level, k) / C(level + true, k).
    """
    hit_so_far = torch.zeros_like(rivals.better)
    for taken in range(depth):
        left = (rivals.level - taken).clamp_min(0)
        hit = hit_so_far + (1 - hit_so_far) * rivals.true / (left + rivals.true)
        hit_so_far = torch.where(rivals.better + taken < depth, hit, hit_so_far)
    return hit_so_far


def _checked(image: Tensor, text: Tensor, truth: Truth | Tensor) -> tuple[Tensor, Tensor, Truth]:
    """Convert features to float32, with their truth, after what is wrong has been refused."""
    image, text = image.detach().float(), text.detach().float()
    _check_features(image, text)
    return image, text, checked(truth, len(image), len(text)).to(image.device)


def _checked_scores(scores: Tensor, truth: Truth | Tensor) -> tuple[Tensor, Truth]:
    """Convert scores to float32, with their truth, after what is wrong has been refused."""
    if scores.ndim != 2:
        raise DataError(f"scores must be images by captions, not {tuple(scores.shape)}")
    if scores.isnan().any():
        raise DataError("a score is not a number; the model that gave it is broken")
    return scores.detach().float(), checked(truth, *scores.shape).to(scores.device)


def _check_features(image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise DataError(
            f"images {tuple(image.shape)} and captions {tuple(text.shape)} are not features of "
            "one width; embed both with the same model"
        )
    for what, features in (("image", image), ("caption", text)):
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise DataError(
                f"the features of {len(bad)} {what}s are not finite, first that of {what} "
                f"{int(bad[0])}; the model that gave them is broken"
            )
    if len(image) and len(text) and _largest(image) * _largest(text) > LARGEST:
        raise DataError("the features are so long that their products overflow; normalise them")


def _largest(features: Tensor) -> float:
    return float(torch.linalg.vector_norm(features, dim=1).max())
