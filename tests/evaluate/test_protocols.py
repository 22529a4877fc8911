import pytest
import torch
from torch.nn.functional import normalize

from crosstill.errors import ConfigError, DataError
from crosstill.evaluate.recall import PROTOCOLS, by_protocol, folds, retrieval


def case(images: int):
    """Features whose captions, one to three an image, come in no order."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(torch.arange(images) % 3 + 1)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    image = normalize(torch.randn(images, 8, generator=generator), dim=1)
    text = normalize(image[owner] + torch.randn(len(owner), 8, generator=generator), dim=1)
    return image, text, owner


def test_folds_are_the_mean_of_separate_runs():
    image, text, owner = case(60)
    parts = []
    for k in range(5):
        own = [int(o) // 12 == k for o in owner]
        columns = torch.tensor(own).nonzero().flatten()
        fold = image[12 * k : 12 * k + 12]
        parts.append(retrieval(fold, text[columns], owner[columns] - 12 * k))
    result = folds(image, text, owner, size=12)
    # the sum of six recalls, not of six sums
    assert result.rsum == pytest.approx(sum(p.rsum for p in parts) / 5, abs=1e-9)
    assert 0 < result.rsum <= 600
    for direction in ("i2t", "t2i"):
        each = [getattr(p, direction) for p in parts]
        mean = getattr(result, direction)
        assert mean.r1 == pytest.approx(sum(r.r1 for r in each) / 5, abs=1e-9)
        assert mean.r5 == pytest.approx(sum(r.r5 for r in each) / 5, abs=1e-9)
        assert mean.r10 == pytest.approx(sum(r.r10 for r in each) / 5, abs=1e-9)
    # no caption is lost or counted twice
    assert (result.images, result.captions) == (60, len(owner))


def test_perfect_features_give_600_in_folds():
    owner = torch.arange(50).repeat_interleave(5)
    image = torch.eye(50)
    assert folds(image, image[owner], owner, size=10).rsum == 600


def test_folds_need_exactly_their_images():
    with pytest.raises(DataError, match="5 folds of 1000 images need 5000 images, not 60"):
        by_protocol("coco-1k-5fold", *case(60))


def test_full_is_plain_retrieval():
    assert by_protocol("full", *case(60)) == retrieval(*case(60))


def test_unknown_protocol_names_the_likely_one():
    assert set(PROTOCOLS) == {"full", "karpathy", "coco-1k-5fold"}
    with pytest.raises(ConfigError, match="did you mean 'coco-1k-5fold'"):
        by_protocol("coco-1k-fold", *case(60))
