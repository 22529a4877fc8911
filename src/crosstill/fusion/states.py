"""Outputs of a fusion model's towers, for training: kept once where they are frozen."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crosstill import decoding, images
from crosstill.cache import PixelStore, Split, memo, pixels
from crosstill.formats import by_length
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.scores import ScoreCache
from crosstill.types import States

BATCH = 128  # inputs of a tower in one go


class Kept:
    """One side's tokens of a split, one input behind the other: `take` gives them padded."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self._flat, self.lengths = flat, lengths
        self._starts = np.cumsum(lengths) - lengths

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Find the tokens of these inputs, one input behind the other."""
        return np.concatenate(
            [
                np.arange(n) + s
                for s, n in zip(self._starts[positions], self.lengths[positions], strict=True)
            ]
        )

    def take(self, positions: np.ndarray) -> States:
        """Return the states of inputs at `positions` of the split, as `Matcher` gives them."""
        lengths = self.lengths[positions]
        mask = np.arange(lengths.max()) < lengths[:, None]
        rows = np.where(mask, self._starts[positions, None] + np.arange(lengths.max()), 0)
        values = torch.from_numpy(self._flat[rows])
        values = values.float() if values.is_floating_point() else values.long()
        return States(values, torch.from_numpy(mask).long())


class Photos:
    """Photos of any size, decoded when they are needed."""

    def __init__(self, cache: ScoreCache, split: Split, preprocess: images.Preprocess) -> None:
        self._cache, self._split, self._preprocess = cache, split, preprocess

    def take(self, positions: np.ndarray) -> list[Tensor]:
        """Decode images at `positions` of the split: uint8 (3, H, W) each."""
        return list(decoding.ahead(self._load, positions.tolist(), window=len(positions)))

    def _load(self, position: int) -> Tensor:
        row = int(self._split.images[position])
        return images.load(self._cache.photo(row), self._cache.paths[row], self._preprocess)


class Sides:
    """Both inputs of a fusion model, by position in a split.

    Attributes:
        keeps: whether they are towers' states, kept because the towers are frozen; else they
            are photos and token ids that the towers have yet to run on.
    """

    def __init__(self, model: Matcher, cache: ScoreCache, split: Split, keep: bool = True) -> None:
        varying = model.preprocess.resize == "fit"
        self.keeps = keep and model.towers_frozen and not varying
        texts = [cache.texts[row] for row in split.captions]
        self._tokens = _tokenized(model, texts)
        self._images_count = len(split.images)
        self._photos: Photos | PixelStore
        if varying:
            self._photos = Photos(cache, split, model.preprocess)
        else:
            self._photos = pixels(cache, split, model.preprocess)
        if not self.keeps:
            return
        # a tower may put a token in front of a caption's own
        one = self._tokens.take(np.arange(1))
        self._more = _read(model, one).mask.shape[1] - one.mask.shape[1]
        lengths = self._tokens.lengths + self._more
        self._texts = Kept(self._kept(model, cache, split, "text"), lengths)
        flat = self._kept(model, cache, split, "image")
        each = len(flat) // len(split.images)
        self._images = Kept(flat, np.full(len(split.images), each))

    def images(self, positions: np.ndarray) -> States | list[Tensor]:
        """Return kept states, or the photos themselves."""
        return self._images.take(positions) if self.keeps else list(self._photos.take(positions))

    def texts(self, positions: np.ndarray) -> States:
        """Return kept states, or token ids."""
        return (self._texts if self.keeps else self._tokens).take(positions)

    def _kept(self, model: Matcher, cache: ScoreCache, split: Split, side: str) -> np.ndarray:
        """Return the tokens of all inputs, one behind the other: (N, ...)."""
        name = f"states-{side}-{model.towers_digest()[:16]}-{split.name}"
        parts = self._looks if side == "image" else self._reads
        path = memo.memoised(cache, name, lambda new: _write(new, *parts(model)))
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _looks(self, model: Matcher) -> tuple[int, Iterator[tuple[np.ndarray, Tensor]]]:
        """Count the tokens of all images, and yield tokens of some of them with their places."""
        count = self._images_count
        each = model.encode_mixed(list(self._photos.take(np.arange(1)))).hidden.shape[1]

        def parts() -> Iterator[tuple[np.ndarray, Tensor]]:
            for rows in batches(np.arange(count)):
                hidden = model.encode_mixed(list(self._photos.take(rows))).hidden
                yield np.add.outer(rows * each, np.arange(each)).ravel(), hidden.flatten(0, 1)

        return count * each, parts()

    def _reads(self, model: Matcher) -> tuple[int, Iterator[tuple[np.ndarray, Tensor]]]:
        """As `_looks`; captions of one length share a pass."""
        tokens = self._tokens
        stored = Kept(np.empty(0), tokens.lengths + self._more)

        def parts() -> Iterator[tuple[np.ndarray, Tensor]]:
            for chunk in by_length(tokens.lengths, BATCH):
                rows = np.array(chunk)
                states = _read(model, tokens.take(rows))
                yield stored.places(rows), states.hidden[states.mask.bool()]

        return int(stored.lengths.sum()), parts()


@torch.inference_mode()
def _read(model: Matcher, tokens: States) -> States:
    return model.encode_texts(States(*(side.to(model.device) for side in tokens)))


def _tokenized(model: Matcher, texts: list[str]) -> Kept:
    parts = [model.tokenize(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    flat = np.concatenate([part.hidden[part.mask.bool()].numpy() for part in parts])
    return Kept(flat, np.concatenate([part.mask.sum(1).numpy() for part in parts]))


def batches(rows: np.ndarray) -> list[np.ndarray]:
    """Cut rows into as many at a time as a tower takes."""
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _write(path: Path, count: int, parts: Iterator[tuple[np.ndarray, Tensor]]) -> None:
    """Put parts of `count` tokens where they belong in a .npy file of half precision or int32."""
    out: np.ndarray | None = None
    with torch.inference_mode():
        for places, values in parts:
            kind = np.float16 if values.is_floating_point() else np.int32
            if out is None:
                out = memo.new_array(path, kind, (count, *values.shape[1:]))
            out[places] = values.cpu().numpy().astype(kind)
    if isinstance(out, np.memmap):
        out.flush()
