from math import exp, log

import pytest
import torch
from placed import IDS, IMAGE_S, IMAGE_T, TEXT_S, TEXT_T, features

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.kd import softened

TEACHER = torch.tensor([[log(3), 0.0]], dtype=torch.float64)
NONE = torch.zeros(1, 2, dtype=torch.bool)


def close(value: torch.Tensor, expected: float, atol: float = 1e-9) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("softening", "expected"), [(1.0, 0.1308120359), (2.0, 0.1453631315), (4.0, 0.1494578650)]
)
def test_closed_forms_with_the_factor_t_squared(softening, expected):
    value = softened(torch.zeros_like(TEACHER), TEACHER, NONE, softening)
    close(value, [expected], atol=1e-10)


def test_the_closed_form_itself():
    # T = 1: teacher (3/4, 1/4) against (1/2, 1/2)
    assert 0.75 * log(1.5) + 0.25 * log(0.5) == pytest.approx(0.1308120359, abs=1e-10)


def test_a_large_t_is_the_squared_error_of_centred_logits():
    # 1/(2n) of the sum of squares of (ln3/2, -ln3/2), n = 2
    limit = log(3) ** 2 / 8
    assert limit == pytest.approx(0.1508686201, abs=1e-10)
    close(softened(torch.zeros_like(TEACHER), TEACHER, NONE, 1000.0), [limit], atol=1e-7)


@pytest.mark.parametrize("softening", [1.0, 4.0])
def test_equal_logits_and_shifted_logits_pay_nothing(softening):
    close(softened(TEACHER, TEACHER, NONE, softening), [0.0])
    close(softened(TEACHER + 7, TEACHER, NONE, softening), [0.0])


def test_absent_entries_are_in_neither_softmax():
    student = torch.tensor([[0.0, 50.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[log(3), -50.0, 0.0]], dtype=torch.float64)
    absent = torch.tensor([[False, True, False]])
    close(softened(student, teacher, absent, 1.0), [0.1308120359], atol=1e-10)


def test_huge_logits_stay_exact_with_finite_gradients():
    # the student puts everything on the wrong entry: ln p = 0, ln q = -2e6 / T
    teacher = torch.tensor([[1e6, -1e6]], dtype=torch.float64)
    student = (-teacher).requires_grad_()
    value = softened(student, teacher, NONE, 0.01)
    value.sum().backward()
    close(value, [0.01**2 * 2e6 / 0.01])
    # T (q - p): (-T, T)
    torch.testing.assert_close(student.grad, torch.tensor([[-0.01, 0.01]], dtype=torch.float64))


def softmax(scores: list[float]) -> list[float]:
    total = sum(exp(x) for x in scores)
    return [exp(x) / total for x in scores]


def scores(image: list[list[float]], text: list[list[float]], i: int, way: int) -> list[float]:
    """Cosines of row i with all that is not another row of its image, number by number."""
    row = []
    for j in range(len(IDS)):
        if j == i or IDS[j] != IDS[i]:
            a, b = (image[i], text[j]) if way == 0 else (image[j], text[i])
            row.append(a[0] * b[0] + a[1] * b[1])
    return row


def by_hand(temperature: float, softening: float) -> float:
    total = 0.0
    for way in (0, 1):
        for i in range(len(IDS)):
            soft = [
                softmax([x / temperature / softening for x in scores(image, text, i, way)])
                for image, text in ((IMAGE_T, TEXT_T), (IMAGE_S, TEXT_S))
            ]
            total += sum(p * log(p / q) for p, q in zip(*soft, strict=True))
    return softening**2 * total / (2 * len(IDS))


@pytest.mark.parametrize(("temperature", "softening"), [(0.05, 1.0), (0.5, 4.0), (1.0, 2.0)])
def test_loops_over_numbers_agree(temperature, softening):
    loss = objectives.build("kd", temperature=temperature, softening=softening)
    value = loss(features(IMAGE_S, TEXT_S), features(IMAGE_T, TEXT_T), torch.tensor(IDS))
    close(value, by_hand(temperature, softening))


def test_the_two_directions_differ_and_both_count():
    one, two = [1.0, 0.0], [0.0, 1.0]
    student, teacher = features([one, one], [one, two]), features([one, two], [one, one])
    loss = objectives.build("kd", temperature=1.0)
    # the teacher's logits are 1, 1 and 0, 0, the student's 1, 0 and 1, 0: as rows the teacher is
    # even and the student sure, twice; as columns the other way round, twice
    sure = 1 / (1 + exp(-1))
    even_to_sure = -0.5 * (log(2 * sure) + log(2 * (1 - sure)))
    sure_to_even = sure * log(2 * sure) + (1 - sure) * log(2 * (1 - sure))
    close(loss(student, teacher, torch.arange(2)), (2 * even_to_sure + 2 * sure_to_even) / 4)


@pytest.mark.parametrize("option", ["temperature", "softening"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_options_below_zero_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be above 0"):
        objectives.build("kd", **{option: value})
