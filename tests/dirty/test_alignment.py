"""Through shuffles, lost photos, processes and epochs: every sample has its own teacher rows."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from crosstill import data, images
from crosstill.cache import build
from crosstill.data import scenes as scenery
from crosstill.train import TrainConfig
from crosstill.train.batches import Stream
from crosstill.train.distributed import Group
from support import SETTINGS, SmallTeacher, same, small_student

EPOCHS = 3
BOUND = {"fp32": 1e-6, "fp16": 1e-5}  # how far from 1 a cosine may be


@pytest.fixture
def teacher() -> SmallTeacher:
    """One that sees what the student sees, so that its rows can be made anew from a batch."""
    teacher = SmallTeacher()
    teacher.preprocess = images.Preprocess(size=(16, 16))
    return teacher


@pytest.fixture
def pairs(tmp_path):
    """A hundred scenes as files: listed in another order, and every twentieth spoilt."""
    listing = scenery.write(tmp_path / "photos", 100)
    record = json.loads(listing.read_text())
    for number, item in enumerate(record["images"]):
        if number % 20 == 7:
            (tmp_path / "photos" / item["filename"]).write_bytes(b"GIF89a spoilt %d" % number)
    random.Random(3).shuffle(record["images"])
    listing.write_text(json.dumps(record))
    return data.open(listing)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", BOUND)
def test_cached_rows_are_freshly_computed_rows(pairs, teacher, tmp_path, dtype, views):
    cache = build(teacher, pairs, tmp_path / "cache", dtype=dtype, views=views)
    assert len(cache.image_ids) == 95
    student = small_student(cache)
    config = TrainConfig(**SETTINGS).changed(["captions_per_image=2"])
    told = {example.image_id: example.captions for example in pairs.examples}
    split, seen, worst = cache.split("train"), Counter(), 1.0
    for rank in range(2):
        group = Group(rank, 2)
        stream = Stream(cache, split, student, config, group)
        share = group.slice_of(config.batch_size)
        for epoch in range(EPOCHS):
            for _, batch, _ in stream.ahead(epoch, 0):
                # from the pixels that the student is given
                fresh = teacher.embed_images(batch.images[batch.image_of])
                # and from the words of the dataset, not of the cache
                rows = split.captions[batch.picked.captions[share]]
                texts = [cache.texts[row] for row in rows]
                keys = [cache.image_ids[i] for i in split.images[batch.picked.images[share]]]
                assert all(text in told[key] for text, key in zip(texts, keys, strict=True))
                asked = student.pad(student.tokenize(texts))
                assert same(batch.texts, asked)
                worst = min(worst, cosines(batch.teacher.image[share], fresh))
                worst = min(worst, cosines(batch.teacher.text[share], teacher.embed_texts(texts)))
                seen.update((epoch, int(row)) for row in rows)
    assert worst >= 1 - BOUND[dtype]
    assert max(seen.values()) == 1, "a pair was shown twice in an epoch"
    assert len(seen) == EPOCHS * stream.sampler.steps_per_epoch * config.batch_size


def cosines(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.double(), right.double()).min())


def test_what_is_lost_later_does_not_move_the_rest(pairs, teacher, tmp_path):
    """The rows of the photos that stay are those of a cache of all of them."""
    whole = build(teacher, pairs, tmp_path / "whole", dtype="fp32")
    shutil.copytree(tmp_path / "photos", tmp_path / "fewer")
    listing = tmp_path / "fewer/dataset.json"
    record = json.loads(listing.read_text())
    record["images"] = [item for n, item in enumerate(record["images"]) if n % 20]
    listing.write_text(json.dumps(record))
    part = build(teacher, data.open(listing), tmp_path / "part", dtype="fp32")
    at = {key: row for row, key in enumerate(whole.image_ids)}
    assert set(part.image_ids) < set(at)
    rows = np.array([at[key] for key in part.image_ids])
    here = part.image_features(np.arange(len(rows)))
    assert torch.equal(here, whole.image_features(rows))
