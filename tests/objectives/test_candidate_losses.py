"""What dcd and cprd share: candidate lists that the teacher ranks."""

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.types import Features

B, D = 7, 5
IDS = torch.tensor([4, 1, 2, 2, 3, 2, 1])

pytestmark = pytest.mark.parametrize("name", ["dcd", "cprd"])


def random(seed: int) -> Features:
    noise = torch.randn(2, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Features(*normalize(noise, dim=2))


def test_order_of_the_batch_is_irrelevant_with_equal_captions(name):
    """Equal captions of different images tie for the teacher, though not for the student."""
    student, teacher = random(0), random(1)
    image, text = ((8 * x).round() / 8 for x in teacher)  # dot products without rounding
    teacher = Features(image, text[[0, 1, 1, 1, 1, 1, 1]])
    loss = objectives.build(name, hardest=2)
    expected = loss(student, teacher, torch.arange(B))
    for seed in range(5):
        order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
        shuffled = [Features(*(x[order] for x in side)) for side in (student, teacher)]
        torch.testing.assert_close(loss(*shuffled, order), expected, rtol=1e-12, atol=0)


def test_autocast_changes_nothing(name):
    student, teacher = (Features(*(x.float() for x in random(s))) for s in (0, 1))
    loss = objectives.build(name)
    expected = loss(student, teacher, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher, IDS), expected)
