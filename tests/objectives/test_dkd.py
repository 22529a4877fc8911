from math import exp, log

import pytest
import torch
from placed import IDS, IMAGE_S, IMAGE_T, TEXT_S, TEXT_T, features

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.dkd import decoupled
from crosstill.objectives.parts import divergence


def close(value: torch.Tensor, expected: object) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9)


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def parts(student: torch.Tensor, teacher: torch.Tensor, absent: tuple[int, ...] = ()):
    """TCKD and NCKD where column 0 is the target."""
    left_out = torch.zeros(student.shape, dtype=torch.bool)
    left_out[:, list(absent)] = True
    return decoupled(student, teacher, left_out, torch.zeros(len(student), dtype=torch.int64))


STUDENT, TEACHER = row(0.3, 0.7, -0.2, 0.0), row(2.0, 1.0, 0.5, -1.0)


def test_closed_forms():
    target, rest = parts(STUDENT, TEACHER)
    close(target, [0.2687345893])
    close(rest, [0.1268348148])


def test_the_parts_make_up_the_divergence():
    sure = TEACHER.softmax(1)[0, 0]
    close(sure, 0.6094600376)
    target, rest = parts(STUDENT, TEACHER)
    close(target + (1 - sure) * rest, [0.3182686531])
    close(divergence(STUDENT, TEACHER, torch.zeros(1, 4, dtype=torch.bool)), [0.3182686531])


def test_even_others_leave_the_target_part_only():
    # teacher (1/2, 1/4, 1/4) against thirds
    target, rest = parts(row(0, 0, 0), row(log(2), 0, 0))
    assert 0.5 * log(1.5) + 0.5 * log(0.75) == pytest.approx(0.0588915178, abs=1e-10)
    close(target, [0.5 * log(1.5) + 0.5 * log(0.75)])
    close(rest, [0.0])


def test_the_target_is_the_column_that_is_named():
    order = [2, 0, 3, 1]  # the target, column 0, moves to column 1
    target, rest = decoupled(
        STUDENT[:, order], TEACHER[:, order], torch.zeros(1, 4, dtype=torch.bool), torch.tensor([1])
    )
    close(target, [0.2687345893])
    close(rest, [0.1268348148])


def test_absent_entries_count_in_neither_part():
    # the closed form with two columns of noise in between
    student, teacher = row(0, 90, 0, 0, -3), row(log(2), -90, 0, 0, 8)
    target, rest = parts(student, teacher, absent=(1, 4))
    close(target, [0.5 * log(1.5) + 0.5 * log(0.75)])
    close(rest, [0.0])


def test_a_row_with_its_target_only_pays_nothing():
    student = row(3.0, 5.0).requires_grad_()
    target, rest = parts(student, row(1.0, -2.0), absent=(1,))
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        (target + rest).sum().backward()
    close(target, [0.0])
    close(rest, [0.0])
    close(student.grad, [[0.0, 0.0]])


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
def test_huge_logits_are_exact_with_finite_gradients(size):
    # the teacher is sure of the target and, among the others, of column 1; the student prefers
    # column 2 to column 1 to the target: ln q_t = -2 size, ln q_1 = -size
    student = row(-size, 0.0, size).requires_grad_()
    target, rest = parts(student, row(size, 0.0, -size))
    (target + rest).sum().backward()
    assert target.item() == pytest.approx(2 * size, rel=1e-12)
    assert rest.item() == pytest.approx(size, rel=1e-12)
    # q - p: of the target against the rest (column 2 holds all of it), of column 1 against 2
    close(student.grad, [[-1.0, -1.0, 2.0]])


def test_a_negative_far_below_the_target_is_not_lost():
    # at T = 0.01 a mask of -1000 would outweigh these others, which lie 2000 below the target
    student, teacher = row(0, -2000, -2000), row(0, -2000 + log(3), -2000)
    target, rest = parts(student, teacher)
    close(target, [0.0])
    close(rest, [0.75 * log(1.5) + 0.25 * log(0.5)])


def weights(image: list[list[float]], text: list[list[float]], i: int, way: int, scale: float):
    """exp(logit) of row i's partner, and of all that show other images, number by number."""
    others = []
    for j in range(len(IDS)):
        a, b = (image[i], text[j]) if way == 0 else (image[j], text[i])
        value = exp((a[0] * b[0] + a[1] * b[1]) / scale)
        if j == i:
            own = value
        elif IDS[j] != IDS[i]:
            others.append(value)
    return own, others


def by_hand(scale: float, alpha: float, beta: float) -> float:
    total = 0.0
    for way in (0, 1):
        for i in range(len(IDS)):
            own_t, others_t = weights(IMAGE_T, TEXT_T, i, way, scale)
            own_s, others_s = weights(IMAGE_S, TEXT_S, i, way, scale)
            rest_t, rest_s = sum(others_t), sum(others_s)
            p, q = own_t / (own_t + rest_t), own_s / (own_s + rest_s)
            total += alpha * (p * log(p / q) + (1 - p) * log((1 - p) / (1 - q)))
            for x, y in zip(others_t, others_s, strict=True):
                total += beta * x / rest_t * log((x / rest_t) / (y / rest_s))
    return total / (2 * len(IDS))


@pytest.mark.parametrize(
    ("temperature", "softening", "alpha", "beta"),
    [(0.05, 1.0, 1.0, 8.0), (0.25, 4.0, 1.0, 0.0), (0.5, 2.0, 0.0, 3.0), (1.0, 1.0, 2.0, 1.0)],
)
def test_loops_over_numbers_agree(temperature, softening, alpha, beta):
    options = {"temperature": temperature, "softening": softening, "alpha": alpha, "beta": beta}
    loss = objectives.build("dkd", **options)
    value = loss(features(IMAGE_S, TEXT_S), features(IMAGE_T, TEXT_T), torch.tensor(IDS))
    close(value, softening**2 * by_hand(temperature * softening, alpha, beta))


def test_the_defaults_are_those_of_the_paper():
    loss = objectives.build("dkd")
    assert (loss.alpha, loss.beta) == (1.0, 8.0)


@pytest.mark.parametrize("option", ["temperature", "softening", "alpha", "beta"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_impossible_options_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be"):
        objectives.build("dkd", **{option: value})
