import pytest
import torch

from crosstill import objectives
from crosstill.objectives.parts import similarity
from crosstill.types import Features

E1, E2 = torch.eye(4, dtype=torch.float64)[:2]


@pytest.mark.parametrize(("student", "expected"), [(E1, 0.0), (E2, 0.5), (-E1, 1.0)])
def test_aligned_orthogonal_and_opposite_images(student, expected):
    loss = objectives.build("similarity")
    value = loss(Features(student[None], E2[None]), Features(E1[None], E2[None]), torch.arange(1))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)


def test_mean_over_rows_and_sum_of_modalities():
    # cosines of images 0.6 and 1, of captions 0 and -1: (1 - .8) / 2 + (1 + .5) / 2
    student = Features(torch.stack([0.6 * E1 + 0.8 * E2, E1]), torch.stack([E2, -E1]))
    teacher = Features(torch.stack([E1, E1]), torch.stack([E1, E1]))
    value = objectives.build("similarity")(student, teacher, torch.arange(2))
    torch.testing.assert_close(value, torch.tensor(0.85, dtype=torch.float64), rtol=0, atol=1e-9)


def test_length_of_the_student_is_irrelevant():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    loss, ids, teacher = objectives.build("similarity"), torch.arange(5), Features(b, a)
    long, short = loss(Features(7 * a, 7 * b), teacher, ids), loss(Features(a, b), teacher, ids)
    torch.testing.assert_close(long, short, rtol=0, atol=1e-12)


def test_dot_products_keep_float32_under_autocast():
    a, b = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        value = similarity(a, b)
    torch.testing.assert_close(value, a @ b.T, rtol=0, atol=1e-5)
    assert similarity(a.bfloat16(), b).dtype == torch.float32
    assert similarity(a.double(), b).dtype == torch.float64
