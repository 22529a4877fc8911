from math import e, log

import pytest
import torch

from crosstill import objectives
from crosstill.types import Features

EYE = torch.eye(4, dtype=torch.float64)


def close(value: torch.Tensor, expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 64])
def test_equal_similarities_give_the_log_of_the_batch(n):
    same = EYE[:1].expand(n, 4)
    close(objectives.build("info_nce")(Features(same, same), None, torch.arange(n)), log(n))


def test_orthonormal_batch():
    assert log(1 + 3 / e) == pytest.approx(0.7436683806, abs=1e-10)
    loss = objectives.build("info_nce", temperature=1.0)
    close(loss(Features(EYE, EYE), None, torch.arange(4)), log(1 + 3 / e))


def test_it_is_the_mean_of_both_directions():
    # S = [[2, 1], [0, 0]]: rows ln(1 + 1/e) and ln 2, columns ln(1 + 1/e^2) and ln(1 + e)
    image = torch.tensor([[2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    loss = objectives.build("info_nce", temperature=1.0)
    rows, columns = log(1 + 1 / e) + log(2), log(1 + e**-2) + log(1 + e)
    value = loss(Features(image, EYE[:2, :2]), None, torch.arange(2))
    close(value, (rows + columns) / 4)


def test_rows_of_one_image_are_no_negatives():
    # images 0, 0, 1, 2: two rows have two negatives, two have three
    loss = objectives.build("info_nce", temperature=1.0)
    value = loss(Features(EYE, EYE), None, torch.tensor([0, 0, 1, 2]))
    close(value, (log(1 + 2 / e) + log(1 + 3 / e)) / 2)


def test_it_needs_no_teacher():
    assert objectives.build("info_nce").needs == frozenset()
