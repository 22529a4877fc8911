"""How long models take for a whole set, measured in turn on one thread.

What counts is the model's own work: encoding of decoded pixels and plain captions, and the scores
of all pairs. Reading and decoding photos does not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from dataclasses import replace
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from crosstill.data import Pairs
from crosstill.evaluate.efficiency import Cost, Stopwatch, one_thread
from crosstill.evaluate.reading import BATCH, captions, readable, sound
from crosstill.formats import by_length
from crosstill.teachers.base import Teacher
from crosstill.teachers.matcher import Matcher, joined

IMAGES, TEXTS = 64, 256  # of a sample; more of either where its pairs need them
LOOKED, READ = 16, 64  # images and captions in a timed pass of a sample
ROUNDS = 8  # timed pieces of a sample's pairs

Piece = TypeVar("Piece", bound=Sized)
Result = TypeVar("Result")
Work = Generator[None, None, Cost]  # stops after every timed piece


def whole_set(
    models: Mapping[str, Teacher | Matcher], pairs: Pairs, sample: int = 0
) -> dict[str, Cost]:
    """Time every model on all images and captions, piece by piece in turn.

    Args:
        models: name → model; dual encoders are timed in full.
        pairs: I images and their T captions; images that one model cannot read are left out.
        sample: pairs that a fusion model is timed on; its I x T are extrapolated from them.
    """
    pairs = readable(pairs, [model.preprocess for model in models.values()])
    works = {
        name: _sampled(model, pairs, sample) if isinstance(model, Matcher) else _full(model, pairs)
        for name, model in models.items()
    }
    with one_thread():
        return _in_turn(works)


def _in_turn(works: Mapping[str, Work]) -> dict[str, Cost]:
    found: dict[str, Cost] = {}
    while len(found) < len(works):
        for name, work in works.items():
            if name not in found:
                try:
                    next(work)
                except StopIteration as end:
                    found[name] = end.value
    return found


def _full(model: Teacher, pairs: Pairs) -> Work:
    """A dual encoder on everything, after a small pass that is not counted."""
    texts, _ = captions(pairs.examples)
    watch = Stopwatch()
    rows: list[Tensor] = []
    model.embed_texts(texts[:LOOKED])
    for pixels in sound(pairs, model.preprocess):
        stack = torch.stack(pixels)
        if not rows:
            model.embed_images(stack[:LOOKED])
        with watch.running():
            rows.append(model.embed_images(stack))
        yield
    words = torch.empty(len(texts), model.dim)
    for chunk in by_length(map(len, texts), BATCH):
        with watch.running():
            words[chunk] = model.embed_texts([texts[row] for row in chunk])
        yield
    for image in torch.cat(rows).split(BATCH):  # so that a large set's scores need not be held
        with watch.running():
            image @ words.T
    return Cost(len(pairs) + len(texts), watch.seconds)


def _sampled(model: Matcher, pairs: Pairs, sample: int) -> Work:
    """A fusion model on random images and captions: medians, extrapolated to all pairs."""
    texts, _ = captions(pairs.examples)
    images, total = len(pairs), len(texts)
    sample = min(sample, images * total)
    few = min(images, max(IMAGES, -(-sample // total)))
    some = min(total, max(TEXTS, -(-sample // few)))
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(images, generator=draw)[:few].tolist()
    words = [texts[row] for row in torch.randperm(total, generator=draw)[:some].tolist()]
    shown = replace(pairs, examples=tuple(pairs.examples[row] for row in chosen))
    pixels = [photo for chunk in sound(shown, model.preprocess) for photo in chunk]
    looks = [pixels[start : start + LOOKED] for start in range(0, few, LOOKED)]
    look, seen = yield from _timed(looks, model.image_states)
    reads = [[words[row] for row in rows] for rows in by_length(map(len, words), READ)]
    read, known = yield from _timed(reads, model.text_states)
    sides = joined(seen), joined(known)
    match, _ = yield from _timed(
        _rounds(few, some, sample), lambda rows: model.match_pairs(*sides, rows)
    )
    passes = images * total
    return Cost(passes, images * look + total * read + passes * match, sample)


def _rounds(images: int, texts: int, sample: int) -> list[Tensor]:
    """(P, 2) rows of images and texts, in pieces that each have short texts and long ones.

    The texts are sorted by length; a text meets all images, as where every pair is scored.
    """
    spread = torch.linspace(0, texts - 1, -(-sample // images)).round().long()
    order = torch.cat([spread[start::ROUNDS] for start in range(ROUNDS)])
    every = torch.cartesian_prod(order, torch.arange(images))[:sample].flip(1)
    return [piece for piece in every.tensor_split(ROUNDS) if len(piece)]


def _timed(
    pieces: Sequence[Piece], job: Callable[[Piece], Result]
) -> Generator[None, None, tuple[float, list[Result]]]:
    """Median seconds of an item, and all results; the first piece is also done before."""
    job(pieces[0])
    seconds, results = [], []
    for piece in pieces:
        watch = Stopwatch()
        with watch.running():
            results.append(job(piece))
        seconds.append(watch.seconds / len(piece))
        yield
    return median(seconds), results
