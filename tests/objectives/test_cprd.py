from math import exp, log

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.types import Features

B, D = 7, 5
IDS = torch.tensor([4, 1, 2, 2, 3, 2, 1])
FOUR = torch.arange(4)
CLOSE = {"rtol": 0, "atol": 1e-9}
EYE = torch.eye(4, dtype=torch.float64)
MIXED = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def random(seed: int) -> Features:
    noise = torch.randn(2, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Features(*normalize(noise, dim=2))


def close(value: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def ranking(**options) -> objectives.Objective:
    """Without the labels' loss."""
    return objectives.build("cprd", task_weight=0.0, **options)


def scored(scores: torch.Tensor) -> Features:
    """Features whose similarities are these (4, 4) numbers: S = S I."""
    return Features(scores, EYE)


def circle(*negatives: float) -> Features:
    """Every row and every column has these three negatives; the partner scores 1."""
    first = torch.tensor([1.0, *negatives], dtype=torch.float64)
    return scored(torch.stack([first.roll(i) for i in range(4)]))


EVEN = scored(torch.zeros(4, 4, dtype=torch.float64))  # a student that prefers nothing


# Values derived by hand.


def test_every_hard_negative_beats_those_below():
    # three negatives: ln 3 for the first, ln 2 for the second, ln 1 for the last
    close(ranking(valid="all")(EVEN, circle(0.5, 0.2, 0.1), FOUR), log(6) / 3)


def test_valid_is_what_lies_above_the_mean():
    close(ranking()(EVEN, circle(0.5, 0.2, 0.1), FOUR), log(3))
    close(ranking()(EVEN, circle(0.5, 0.4, 0.0), FOUR), (log(3) + log(2)) / 2)


def test_easy_negatives_are_beaten_but_not_ranked():
    close(ranking(hardest=1, valid="all")(EVEN, circle(0.5, 0.4, 0.0), FOUR), log(3))
    student = scored(MIXED)
    loss = ranking(hardest=1)
    assert torch.equal(
        loss(student, circle(0.5, 0.2, 0.1), FOUR), loss(student, circle(0.5, 0.1, 0.2), FOUR)
    )
    assert not torch.isclose(
        loss(student, circle(0.5, 0.2, 0.1), FOUR), loss(student, circle(0.2, 0.5, 0.1), FOUR)
    )


def test_a_student_in_the_teachers_order_and_one_against_it():
    teacher, wrong = circle(0.3, 0.2, 0.1), circle(0.1, 0.2, 0.3)
    loss = ranking(valid="all", temperature=0.1)
    # logits 3, 2, 1: the first against all, the second against the last
    right = [log(1 + exp(-1) + exp(-2)), log(1 + exp(-1)), 0]
    against = [log(1 + exp(1) + exp(2)), log(1 + exp(1)), 0]
    close(loss(teacher, teacher, FOUR), sum(right) / 3)
    close(loss(wrong, teacher, FOUR), sum(against) / 3)


def test_ties_of_the_teacher_are_not_ranked():
    close(ranking(valid="all")(EVEN, circle(0.2, 0.2, 0.2), FOUR), 0.0)
    # two tied ones have one below each
    close(ranking(valid="all")(EVEN, circle(0.2, 0.2, 0.1), FOUR), 2 * log(2) / 3)


def test_rounding_is_not_an_order():
    nearly = circle(0.2, 0.2 + 1e-8, 0.2 - 1e-8)
    for rule in ("all", "above_mean"):
        close(ranking(valid=rule)(EVEN, nearly, FOUR), 0.0)
    # rows: only the first has a valid one; columns: .5 of the second, both .2 of the last
    table = nearly.image.clone()
    table[0, 1:] = torch.tensor([0.5, 0.2, 0.1])
    expected = (log(3) + (log(3) + 2 * log(2)) / 3) / 2
    close(ranking()(EVEN, scored(table), FOUR), expected)


def test_only_the_order_of_the_teacher_counts():
    student, teacher = random(0), random(1)
    loss = ranking(valid="all")
    smaller = Features(teacher.image / 10, teacher.text)
    assert torch.equal(loss(student, teacher, IDS), loss(student, smaller, IDS))


def test_the_own_partner_takes_no_part():
    loss, teacher = ranking(), circle(0.5, 0.4, 0.0)
    higher = scored(MIXED + 3 * EYE)
    assert torch.equal(loss(scored(MIXED), teacher, FOUR), loss(higher, teacher, FOUR))


def test_the_task_is_info_nce():
    student, teacher = random(0), random(1)
    task = objectives.build("info_nce", temperature=0.1)(student, teacher, IDS)
    for weight in (1.0, 0.5):
        loss = objectives.build("cprd", temperature=0.1, task_weight=weight)
        alone = ranking(temperature=0.1)(student, teacher, IDS)
        close(loss(student, teacher, IDS), float(alone + weight * task))
    default = objectives.build("cprd", temperature=0.1)(student, teacher, IDS)
    close(default, float(ranking(temperature=0.1)(student, teacher, IDS) + task))


# Once more, with loops over numbers.


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow(queries, partners, own, count, rule, tau):
    ids, terms = IDS.tolist(), []
    for i in range(B):
        away = [j for j in range(B) if ids[j] != ids[i]]
        target = {j: dot(queries[i], partners[j]) for j in away}
        score = {j: dot(own[0][i], own[1][j]) / tau for j in away}
        for k in sorted(away, key=lambda j: -target[j])[:count]:
            if rule == "above_mean" and target[k] <= sum(target.values()) / len(target):
                continue
            below = [exp(score[j]) for j in away if target[j] < target[k]]
            terms.append(-log(exp(score[k]) / (exp(score[k]) + sum(below))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("rule", ["above_mean", "all"])
def test_by_loops(rule, count):
    student, teacher = random(0), random(1)
    s, t = ([side.tolist() for side in features] for features in (student, teacher))
    image = slow(t[0], t[1], (s[0], s[1]), count, rule, 0.2)
    text = slow(t[1], t[0], (s[1], s[0]), count, rule, 0.2)
    loss = ranking(hardest=count, valid=rule, temperature=0.2)
    close(loss(student, teacher, IDS), (image + text) / 2)


# What every loss owes, for the options that are no defaults.


@pytest.mark.parametrize("rule", ["above_mean", "all"])
def test_gradient_is_that_of_the_value(rule):
    loss = objectives.build("cprd", hardest=3, valid=rule)
    inputs = tuple(x.requires_grad_() for x in random(0))
    assert torch.autograd.gradcheck(lambda *s: loss(Features(*s), random(1), IDS), inputs)


@pytest.mark.parametrize("size", [1, 2, B])
def test_nothing_to_rank_costs_nothing(size):
    loss, rows = ranking(valid="all"), [torch.ones(size, D).requires_grad_() for _ in range(2)]
    for ids in (torch.arange(size), torch.zeros(size, dtype=torch.int64)):
        total = loss(Features(*rows), Features(*rows), ids)
        total.backward()
        assert total == 0
        assert all(not x.grad.any() for x in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hardest": 0}, "hardest must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"task_weight": -0.5}, "task_weight must be 0 or above, not -0.5"),
        ({"valid": "some"}, "valid = 'some' does not fit"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, said):
    with pytest.raises(ConfigError) as caught:
        objectives.build("cprd", **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
