import pytest
import torch

from crosstill import objectives
from crosstill.objectives.hard_negative import triplet
from crosstill.types import Features

SCORES = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.5, 0.6], [0.2, 0.4, 0.7]], dtype=torch.float64)
IDS = torch.arange(3)


def close(value: torch.Tensor, expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("negatives", "expected"), [("hardest", 1.0), ("all", 1.1)])
def test_three_rows_by_hand(negatives, expected):
    # rows: .1 | 0, .3 | 0, 0 -> .1 + .3; columns: 0, 0 | .5, .1 | 0, .1 -> .5 + .1, all 1.1
    close(triplet(SCORES, IDS, margin=0.2, negatives=negatives), expected)


@pytest.mark.parametrize(("negatives", "expected"), [("hardest", 2.0), ("all", 8.0)])
def test_collapsed_scores(negatives, expected):
    # N = 5, m = .2: 2 N m and 2 N (N - 1) m
    scores = torch.full((5, 5), 0.4, dtype=torch.float64)
    close(triplet(scores, torch.arange(5), margin=0.2, negatives=negatives), expected)


def test_rows_of_one_image_are_no_negatives():
    # without S_01 and S_10 the rows give 0 | .3 | 0 and the columns 0 | .1 | .1
    ids = torch.tensor([0, 0, 1])
    close(triplet(SCORES, ids, margin=0.2, negatives="hardest"), 0.5)
    close(triplet(SCORES, torch.zeros(3), margin=0.2, negatives="all"), 0.0)


@pytest.mark.parametrize(("masked", "once"), [(True, 0.5), (False, 1.0)])
def test_rows_of_one_image_are_negatives_where_the_mask_is_off(masked, once):
    # as above, with only the diagonal left out (eq. 10-12)
    loss = objectives.build("hard_negative", margin=0.2, mask_same_image=masked)
    eye = torch.eye(3, dtype=torch.float64)
    ids = torch.tensor([0, 0, 1])
    close(loss(Features(SCORES, SCORES), Features(eye, eye), ids), 4 * once)


@pytest.mark.parametrize(("negatives", "once"), [("hardest", 1.0), ("all", 1.1)])
def test_the_loss_sums_four_pairs(negatives, once):
    # S = a b^T with a = S, b = I; image and text alike on each side make four equal terms
    loss = objectives.build("hard_negative", margin=0.2, negatives=negatives)
    eye = torch.eye(3, dtype=torch.float64)
    close(loss(Features(SCORES, SCORES), Features(eye, eye), IDS), 4 * once)


def test_each_pair_is_counted_once():
    # only student text (negated) against the teacher: (t, v) and (t, t) violate, by 1 a row
    # and 1 a column at N = 2
    loss = objectives.build("hard_negative", margin=0.0)
    eye = torch.eye(2, dtype=torch.float64)
    close(loss(Features(eye, -eye), Features(eye, eye), torch.arange(2)), 8.0)


def test_a_student_that_separates_pays_nothing():
    eye = torch.eye(4, dtype=torch.float64)
    loss = objectives.build("hard_negative", margin=0.9)
    close(loss(Features(eye, eye), Features(eye, eye), torch.arange(4)), 0.0)


@pytest.mark.parametrize(("margin", "remedy"), [(0.0, "margin=0.2"), (0.05, "")])
def test_without_a_margin_it_names_what_keeps_rows_apart(margin, remedy):
    loss = objectives.build("hard_negative", margin=margin)
    assert loss.apart == remedy
    same = torch.ones(4, 3) / 3**0.5
    value = float(loss(Features(same, same), Features(same, same), torch.arange(4)))
    assert (value > 1e-5) == (not remedy)
