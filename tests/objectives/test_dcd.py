from functools import partial
from math import e, exp, log, log1p

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.dcd import (
    best_bias,
    binary_cross_entropy,
    confidence,
    matching_loss,
    squared_error,
    uncertainty,
    variant_loss,
)
from crosstill.objectives.parts import hardest, list_cross_entropy
from crosstill.types import Features

B, D = 7, 5
IDS = torch.tensor([4, 1, 2, 2, 3, 2, 1])
CLOSE = {"rtol": 0, "atol": 1e-9}

uncertainty_loss = partial(variant_loss, variant="uncertainty")
focal_loss = partial(variant_loss, variant="focal")


def random(seed: int) -> Features:
    noise = torch.randn(2, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Features(*normalize(noise, dim=2))


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(value: torch.Tensor, *expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(value.shape)
    torch.testing.assert_close(value, wanted, **CLOSE)


# Candidate lists.


def test_the_hardest_of_other_images_come_in_the_teachers_order():
    teacher = matrix([9, 1, 3, 2], [5, 0, 4, 6], [7, 8, 1, 2], [1, 2, 3, 4])
    lists = hardest(teacher, torch.zeros(4, 4), torch.tensor([0, 1, 1, 2]), 2)
    # row 1 may not have column 2, row 2 may not have column 1
    assert lists.columns.tolist() == [[0, 2, 3], [1, 3, 0], [2, 0, 3], [3, 2, 1]]
    assert lists.valid.all()
    assert lists.pick(teacher)[1].tolist() == [0, 6, 5]


def test_a_row_with_few_other_images_has_a_shorter_list():
    lists = hardest(torch.eye(4), torch.eye(4), torch.tensor([0, 0, 0, 1]), 7)
    assert lists.columns.shape == (4, 4)
    assert lists.valid.sum(1).tolist() == [2, 2, 2, 4]
    assert lists.columns[:3, 1].tolist() == [3, 3, 3]
    assert sorted(lists.columns[3].tolist()) == [0, 1, 2, 3]


def test_a_batch_of_one_has_only_the_partner():
    lists = hardest(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([5]), 7)
    assert lists.columns.tolist() == [[0]]
    assert lists.valid.tolist() == [[True]]


def test_the_student_settles_a_tie_of_the_teacher():
    teacher = matrix([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    student = matrix([0, 1, 3, 2], [3, 0, 1, 2], [1, 2, 0, 3], [1, 3, 2, 0])
    columns = hardest(teacher, student, torch.arange(4), 1).columns
    assert columns[:, 1].tolist() == [2, 0, 3, 1]


# Score lists, by hand.

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_uncertainty_is_the_share_of_the_entropy():
    even, sure = log(2), log(4) - 0.75 * log(3)  # of (1/2, 1/2) and of (3/4, 1/4)
    expected = even / (even + sure), sure / (even + sure)
    close(uncertainty(matrix([0, 0], [log(3), 0])), *expected)
    third = matrix([0, 0, -1e9], [log(3), 0, 50])
    close(uncertainty(third, MASK), *expected)


def test_uncertainty_without_any_is_shared_equally():
    close(uncertainty(matrix([2000, 0], [0, 9000], [5000, 0])), 1 / 3, 1 / 3, 1 / 3)
    close(uncertainty(matrix([3])), 1)


def test_confidence():
    close(confidence(torch.tensor([1.0, 0.0], dtype=torch.float64)), 1 / (1 + e), e / (1 + e))


def test_squared_error_is_a_mean_over_the_valid():
    student, teacher = matrix([1, 2, 3], [1, 2, 3]), matrix([1, 0, 0], [0, 0, 0])
    close(squared_error(student, teacher), 13 / 3, 14 / 3)
    close(squared_error(student, teacher, MASK), 13 / 3, 5 / 2)


def test_binary_cross_entropy_wants_the_first_only():
    scores = matrix([2, -1, 3], [0, 1, 3])
    first = log1p(exp(-2)) + log1p(exp(-1)) + log1p(exp(3))
    close(binary_cross_entropy(scores, MASK), first / 3, (log(2) + log1p(e)) / 2)


def test_cross_entropy_of_the_first():
    scores = matrix([log(2), 0, 0], [0, 0, 0])
    close(list_cross_entropy(scores), log(2), log(3))
    close(list_cross_entropy(scores, MASK), log(2), log(2))
    close(list_cross_entropy(matrix([5])), 0)


def test_cross_entropy_keeps_its_digits():
    value = list_cross_entropy(torch.tensor([[60.0, 0.0]]))
    torch.testing.assert_close(value, torch.tensor([exp(-60)]), rtol=1e-6, atol=0)
    assert list_cross_entropy(torch.tensor([[0.0, 200.0]])) == 200


def test_cross_entropy_without_negatives_meets_no_nan_on_the_way_back():
    scores = matrix([5, 1], [3, 2]).requires_grad_()
    alone = torch.tensor([[True, False], [True, True]])
    with torch.autograd.set_detect_anomaly(True):
        list_cross_entropy(scores, alone).sum().backward()
    close(scores.grad[0], 0, 0)


LISTS = {"student": matrix([0, 0], [2, 0]), "teacher": matrix([0, 0], [log(3), 0])}
EVEN, SURE = log(2), log(4) - 0.75 * log(3)
ERRORS = 0.0, (2 - log(3)) ** 2 / 2


def lists() -> list[torch.Tensor]:
    return list(LISTS.values())


def test_uncertainty_loss_by_hand():
    u = EVEN / (EVEN + SURE), SURE / (EVEN + SURE)
    weights = [exp((1 - x) ** 2) for x in u]
    distil = sum(w * x for w, x in zip(weights, ERRORS, strict=True)) / sum(weights)
    task = u[0] * log(2) + u[1] * (log1p(exp(-2)) + log(2)) / 2
    close(uncertainty_loss(*lists()), 0.2 * distil + 0.8 * task)
    close(uncertainty_loss(*lists(), alpha=1.0), distil)
    close(uncertainty_loss(*lists(), alpha=0.0), task)


def test_focal_loss_by_hand():
    paid, due = [log(2), log1p(exp(-2))], [log(2), log(4 / 3)]
    weights = [1 - exp(-p / d) for p, d in zip(paid, due, strict=True)]
    distil = sum(w * x for w, x in zip(weights, ERRORS, strict=True)) / 2
    close(focal_loss(*lists()), 0.2 * distil + sum(paid) / 2)


def test_released_weights_of_the_uncertainty_do_nothing():
    plain = uncertainty_loss(*lists(), alpha=1.0, reduction="released")
    close(plain, sum(ERRORS) / 2)
    assert abs(plain - uncertainty_loss(*lists(), alpha=1.0)) > 0.01


def test_released_focal_weights_the_error_of_the_batch():
    weights = 1 - exp(-1), 1 - exp(-log1p(exp(-2)) / log(4 / 3))
    expected = sum(weights) / 2 * sum(ERRORS) / 2
    value = focal_loss(*lists(), alpha=1.0, reduction="released")
    close(value - list_cross_entropy(LISTS["student"]).mean(), expected)


@pytest.mark.parametrize("garbage", [1e30, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("reduction", ["sample", "released"])
@pytest.mark.parametrize("loss", [uncertainty_loss, focal_loss])
def test_invalid_entries_are_never_looked_at(loss, reduction, garbage):
    results = []
    for filler in (0.0, garbage):
        student = matrix([1, 2, 3], [1, 2, filler]).requires_grad_()
        teacher = matrix([2, 0, 1], [0.5, 0, filler])
        value = loss(student, teacher, MASK, reduction=reduction)
        results.append((value, *torch.autograd.grad(value, student)))
    assert all(x.isfinite().all() for x in results[1])
    torch.testing.assert_close(results[0], results[1])
    assert results[1][1][1, 2] == 0


@pytest.mark.parametrize("variant", ["uncertainty", "plain"])
@pytest.mark.parametrize("free_bias", [False, True])
@pytest.mark.parametrize("valid", [None, MASK])
def test_gradient_of_score_lists(variant, free_bias, valid):
    student = matrix([1, 2, 3], [1, 2, 0.5]).requires_grad_()
    teacher = matrix([2, 0, 1], [0.5, 0, 1])
    options = {"variant": variant, "free_bias": free_bias}
    assert torch.autograd.gradcheck(lambda s: variant_loss(s, teacher, valid, **options), student)


@pytest.mark.parametrize("valid", [None, MASK])
def test_the_focal_weight_is_a_constant_to_the_gradient(valid):
    student = matrix([1, 2, 3], [1, 2, 0.5]).requires_grad_()
    teacher = matrix([2, 0, 1], [0.5, 0, 1])
    ratio = list_cross_entropy(student.detach(), valid) / list_cross_entropy(teacher, valid)
    constant = 1 - torch.exp(-ratio)
    expected = 0.2 * (constant * squared_error(student, teacher, valid)).mean()
    expected = expected + list_cross_entropy(student, valid).mean()
    value = focal_loss(student, teacher, valid)
    close(value, expected.item())
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], **CLOSE)


@pytest.mark.parametrize("gap", [20.0, 90.0, 1e4])
def test_focal_gradient_where_neither_model_doubts(gap):
    student = torch.tensor([[gap, 0.0, -1.0]]).requires_grad_()
    teacher = torch.tensor([[gap, 1.0, -1.0]])
    focal_loss(student, teacher).backward()
    assert student.grad.abs().max() < 1


# The loss on features, once more with loops over numbers.


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_lists(queries: list, partners: list, own: tuple[list, list], h: int, tau: float):
    """Per query the student's and the teacher's scores of its candidates."""
    ids, found = IDS.tolist(), []
    for i in range(B):
        target = [dot(queries[i], p) / tau for p in partners]
        score = [dot(own[0][i], p) / tau for p in own[1]]
        away = sorted((j for j in range(B) if ids[j] != ids[i]), key=lambda j: -target[j])
        kept = [i, *away[:h]]
        found.append(([score[j] for j in kept], [target[j] for j in kept]))
    return found


def slow_ce(scores: list[float]) -> float:
    return -log(exp(scores[0]) / sum(exp(s) for s in scores))


def slow_uncertainty_loss(pairs, alpha, released):
    entropies = []
    for _, target in pairs:
        p = [exp(t) / sum(exp(x) for x in target) for t in target]
        entropies.append(-sum(x * log(x) for x in p))
    u = [h / sum(entropies) for h in entropies]
    weights = [exp((1 - x) ** 2) for x in u]
    weights = [w / sum(weights) for w in weights]
    distil = sum(w * x for w, x in zip(weights, slow_errors(pairs, released), strict=True))
    task = 0.0
    for share, (score, _) in zip(u, pairs, strict=True):
        losses = [-log(1 / (1 + exp(-score[0])))]
        losses += [-log(1 - 1 / (1 + exp(-s))) for s in score[1:]]
        task += share * sum(losses) / len(losses)
    return alpha * distil + (1 - alpha) * task


def slow_focal_loss(pairs, alpha, released):
    errors = slow_errors(pairs, released)
    weights = [1 - exp(-slow_ce(s) / slow_ce(t)) for s, t in pairs]
    distil = sum(w * x for w, x in zip(weights, errors, strict=True)) / len(pairs)
    return alpha * distil + sum(slow_ce(s) for s, _ in pairs) / len(pairs)


def slow_errors(pairs, released):
    squares = [[(s - t) ** 2 for s, t in zip(*pair, strict=True)] for pair in pairs]
    if released:
        every = [x for row in squares for x in row]
        return [sum(every) / len(every)] * len(pairs)
    return [sum(row) / len(row) for row in squares]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("reduction", ["sample", "released"])
@pytest.mark.parametrize("variant", ["uncertainty", "focal"])
def test_by_loops(variant, reduction, count):
    student, teacher = random(0), random(1)
    s, t = ([side.tolist() for side in features] for features in (student, teacher))
    slow = slow_uncertainty_loss if variant == "uncertainty" else slow_focal_loss
    expected = {}
    for name, a, b in (("image", 0, 1), ("text", 1, 0)):
        pairs = slow_lists(t[a], t[b], (s[a], s[b]), count, 0.2)
        expected[name] = slow(pairs, 0.3, reduction == "released")
    expected["both"] = (expected["image"] + expected["text"]) / 2
    for directions, wanted in expected.items():
        loss = objectives.build(
            "dcd",
            temperature=0.2,
            hardest=count,
            alpha=0.3,
            variant=variant,
            reduction=reduction,
            directions=directions,
        )
        close(loss(student, teacher, IDS), wanted)


def test_defaults_are_the_papers():
    student, teacher = random(0), random(1)
    pairs = [
        slow_lists(*(x.tolist() for x in t), tuple(x.tolist() for x in s), 7, 0.05)
        for s, t in ((student, teacher), (student[::-1], teacher[::-1]))
    ]
    expected = sum(slow_uncertainty_loss(p, 0.2, False) for p in pairs) / 2
    close(objectives.build("dcd")(student, teacher, IDS), expected)


def test_a_batch_of_one_has_only_the_label():
    # student and teacher agree on a cosine of 1; u = 1
    one = Features(matrix([1, 0]), matrix([1, 0]))
    loss = objectives.build("dcd", temperature=1.0)
    close(loss(one, one, torch.tensor([3])), 0.8 * log1p(exp(-1)))


@pytest.mark.parametrize("variant", ["uncertainty", "focal"])
@pytest.mark.parametrize("reduction", ["sample", "released"])
@pytest.mark.parametrize("size", [1, 2, B])
def test_finite_for_degenerate_batches(variant, reduction, size):
    loss = objectives.build("dcd", variant=variant, reduction=reduction)
    for value, ids in ((0.0, torch.arange(size)), (D**-0.5, torch.zeros(size, dtype=torch.int64))):
        rows = [torch.full((size, D), value).requires_grad_() for _ in range(2)]
        total = loss(Features(*rows), Features(*rows), ids)
        total.backward()
        assert total.isfinite()
        assert all(x.grad.isfinite().all() for x in rows)


@pytest.mark.parametrize("variant", ["uncertainty", "plain"])
@pytest.mark.parametrize("reduction", ["sample", "released"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_gradient_of_every_variant(variant, reduction, calibrate):
    options = {"variant": variant, "reduction": reduction, "calibrate": calibrate}
    loss = objectives.build("dcd", hardest=3, **options)
    inputs = tuple(x.requires_grad_() for x in random(0))
    assert torch.autograd.gradcheck(lambda *s: loss(Features(*s), random(1), IDS), inputs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.5}, "alpha must be between 0 and 1, not 1.5"),
        ({"alpha": float("nan")}, "alpha must be between 0 and 1"),
        ({"hardest": 0}, "hardest must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"threshold": 2.0}, "threshold is a cosine, between -1 and 1, not 2.0"),
        ({"threshold": 0.3, "calibrate": True}, "threshold = 0.3: calibrate finds the border"),
        ({"matching": -1.0}, "matching must be 0 or above, not -1.0"),
        ({"variant": "local"}, "variant = 'local' does not fit"),
        ({"directions": "none"}, "directions = 'none' does not fit"),
        ({"reduction": "mean"}, "reduction = 'mean' does not fit"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, said):
    with pytest.raises(ConfigError) as caught:
        objectives.build("dcd", **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_threshold_moves_the_label_part_alone():
    student, teacher = random(0), random(1)
    for alpha, moves in ((1.0, False), (0.0, True)):
        plain, shifted = (
            objectives.build("dcd", alpha=alpha, threshold=threshold)(student, teacher, IDS)
            for threshold in (0.0, 0.3)
        )
        assert torch.allclose(plain, shifted, rtol=0, atol=1e-9) != moves


def test_a_threshold_by_hand():
    # two orthogonal pairs at temperature 1: scores 1 - c and 0 - c, labels 1 and 0; u is 1/2 each
    eye = torch.eye(2, dtype=torch.float64)
    loss = objectives.build("dcd", temperature=1.0, threshold=0.25, alpha=0.0)
    expected = (log1p(exp(-0.75)) + log1p(exp(-0.25))) / 2
    close(loss(Features(eye, eye), Features(eye, eye), torch.arange(2)), expected)


# A dual encoder's scale and biases.


@pytest.mark.parametrize("variant", ["uncertainty", "plain"])
def test_calibrated_parts_are_least_at_their_biases(variant):
    student, teacher = matrix([1, 2, 3], [1, 2, 0.5]), matrix([2, 0, 1], [0.5, 0, 1])
    for alpha in (0.0, 1.0):
        options = {"variant": variant, "alpha": alpha}
        least = variant_loss(student, teacher, MASK, free_bias=True, **options)
        shifted = [
            variant_loss(student + b, teacher, MASK, **options)
            for b in torch.linspace(-6, 6, 2401, dtype=torch.float64)
        ]
        torch.testing.assert_close(least, min(shifted), rtol=0, atol=1e-4)
        assert all(least <= value + 1e-12 for value in shifted)


def test_the_bias_of_one_true_and_one_false_partner_of_equal_score():
    # sigmoid(s + b) = 1/2 for both; and of one true and three false ones 1/4
    one = torch.ones(1, dtype=torch.float64)
    close(best_bias(matrix([3, 3]), None, one), -3)
    close(best_bias(matrix([3, 3, 3, 3]), None, one), -3 - log(3))


@pytest.mark.parametrize("shift", [-0.4, 0.3])
def test_a_calibrated_loss_does_not_move_all_cosines_at_once(shift):
    rows = torch.eye(4, dtype=torch.float64)
    cosines = (0.5 * rows + shift).requires_grad_()
    loss = objectives.build("dcd", calibrate=True, hardest=3)
    loss(Features(cosines, rows), Features(rows, rows), torch.arange(4)).backward()
    close(cosines.grad.sum(), 0)
    plain = objectives.build("dcd", hardest=3)
    moved = cosines.detach().requires_grad_()
    plain(Features(moved, rows), Features(rows, rows), torch.arange(4)).backward()
    assert moved.grad.sum().abs() > 0.1


def test_the_scale_is_learned_and_starts_at_the_temperature():
    loss = objectives.build("dcd", calibrate=True, temperature=0.1, alpha=0.0, hardest=3)
    student, teacher = random(0), random(1)
    loss(student, teacher, IDS).backward()
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    assert loss.log_scale.grad.abs() > 0
    with torch.no_grad():
        loss.log_scale.fill_(log(2))
    # plain, since the teacher's doubt depends on the temperature too
    options = {"calibrate": True, "alpha": 0.0, "hardest": 3, "variant": "plain"}
    doubled, half = (objectives.build("dcd", temperature=t, **options) for t in (0.1, 0.05))
    doubled.load_state_dict(loss.state_dict())
    close(doubled(student, teacher, IDS), half(student, teacher, IDS).item())


def test_without_calibration_nothing_is_learned():
    assert not list(objectives.build("dcd").parameters())


def test_matching_by_hand():
    # per list (softplus(-s_0) + the mean of softplus of the false) / 2; the second has one false
    scores = matrix([1, 2, -1], [0, 3, 5])
    first = (log1p(exp(-1)) + (log1p(exp(2)) + log1p(exp(-1))) / 2) / 2
    second = (log(2) + log1p(exp(3))) / 2
    close(matching_loss(scores, MASK), (first + second) / 2)
    close(matching_loss(matrix([0])), log(2) / 2)
