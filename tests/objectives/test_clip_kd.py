from copy import deepcopy
from math import e, exp, log, log1p, sqrt

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.clip_kd import contrastive_gradients
from crosstill.types import Features

B, D, TAU = 7, 5, 0.3
IDS = torch.tensor([4, 1, 2, 2, 3, 2, 1])
ALL = ["task", "fd", "icl", "crd", "gd", "afd"]
CLOSE = {"rtol": 0, "atol": 1e-9}
EYE = torch.eye(4, dtype=torch.float64)


def random(seed: int) -> Features:
    noise = torch.randn(2, B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Features(*normalize(noise, dim=2))


def one(part: str, **options) -> objectives.Objective:
    """That part alone, with weight 1."""
    return objectives.build("clip_kd", dim=D, parts=[part], weights={part: 1.0}, **options)


def close(value: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(value.double(), torch.tensor(expected, dtype=torch.float64), **CLOSE)


# The parts once more, with loops over numbers.


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def shares(queries: list, partners: list, i: int) -> dict[int, float]:
    """Row i's softmax over the columns that may stand against it."""
    ids = IDS.tolist()
    kept = [j for j in range(len(ids)) if j == i or ids[j] != ids[i]]
    weights = {j: exp(dot(queries[i], partners[j]) / TAU) for j in kept}
    return {j: w / sum(weights.values()) for j, w in weights.items()}


def rows(queries: list, partners: list) -> float:
    return sum(-log(shares(queries, partners, i)[i]) for i in range(B)) / B


def slow_task(student, teacher):
    image, text = student
    return (rows(image, text) + rows(text, image)) / 2


def slow_fd(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum((s[i][d] - t[i][d]) ** 2 for i in range(B) for d in range(D)) / (B * D)
    return total


def slow_icl(student, teacher):
    return (rows(student[0], teacher[1]) + rows(student[1], teacher[0])) / 2


def slow_crd(student, teacher):
    total = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(B):
            p, q = shares(teacher[a], teacher[b], i), shares(student[a], student[b], i)
            total += sum(p[j] * log(p[j] / q[j]) for j in p) / B
    return total / 2


def slow_gradients(side):
    """Difference quotients, central, of the task's loss."""
    step, gradients = 1e-5, [[[0.0] * D for _ in range(B)] for _ in range(2)]
    for m in range(2):
        for i in range(B):
            for d in range(D):
                old, values = side[m][i][d], []
                for sign in (1, -1):
                    side[m][i][d] = old + sign * step
                    values.append(slow_task(side, None))
                side[m][i][d] = old
                gradients[m][i][d] = (values[0] - values[1]) / (2 * step)
    return gradients


def slow_gd(student, teacher):
    return slow_fd(slow_gradients(student), slow_gradients(teacher))


SLOW = {"task": slow_task, "fd": slow_fd, "icl": slow_icl, "crd": slow_crd, "gd": slow_gd}


@pytest.mark.parametrize("part", SLOW)
def test_each_part_by_loops(part):
    student, teacher = random(0), random(1)
    lists = [[side.tolist() for side in features] for features in (student, teacher)]
    value = one(part, temperature=TAU)(student, teacher, IDS)
    assert value > 1e-4
    close(value, SLOW[part](*lists))


def test_afd_by_loops():
    student, teacher = random(0), random(1)
    loss = one("afd", temperature=TAU)
    weight, bias = loss.fusion.weight.tolist(), loss.fusion.bias.tolist()
    fused = []
    for m in range(2):
        fused.append([])
        for i in range(B):
            joined = student[m][i].tolist() + teacher[m][i].tolist()
            raw = [dot(weight[m][d], joined) + bias[m][d] for d in range(D)]
            fused[m].append([x / sqrt(dot(raw, raw)) for x in raw])
    close(loss(student, teacher, IDS).detach(), slow_task(fused, None))


def test_the_default_is_the_sum_of_four_parts_with_the_published_weights():
    student, teacher = random(0), random(1)
    value = objectives.build("clip_kd")(student, teacher, IDS)
    expected = [one(part)(student, teacher, IDS) for part in ALL[:4]]
    close(value, float(expected[0] + 2000 * expected[1] + expected[2] + expected[3]))


@pytest.mark.parametrize(("part", "weight"), [("gd", 1e8), ("afd", 1.0), ("fd", 2000.0)])
def test_published_weights(part, weight):
    student, teacher = random(0), random(1)
    published = objectives.build("clip_kd", dim=D, parts=[part])(student, teacher, IDS)
    torch.testing.assert_close(published, weight * one(part)(student, teacher, IDS))


def test_a_weight_of_ones_own_changes_that_part_only():
    student, teacher = random(0), random(1)
    built = objectives.build("clip_kd", parts=["fd", "crd"], weights={"crd": 3})
    parts = [one(part)(student, teacher, IDS) for part in ("fd", "crd")]
    close(built(student, teacher, IDS), float(2000 * parts[0] + 3 * parts[1]))


# Values derived by hand.


def test_fd_of_two_axes():
    # |e1 - e2|^2 = 2 over 4 numbers, images only
    student = Features(EYE[:1], EYE[2:3])
    close(one("fd")(student, Features(EYE[1:2], EYE[2:3]), torch.tensor([0])), 0.5)


@pytest.mark.parametrize("part", ["task", "icl"])
def test_orthonormal_batch(part):
    same = Features(EYE, EYE)
    close(one(part, temperature=1.0)(same, same, torch.arange(4)), 0.7436683806286791)
    assert log1p(3 / e) == pytest.approx(0.7436683806286791, abs=1e-15)


def test_icl_looks_for_the_teacher():
    # the teacher's rows are all alike, so every row guesses: ln 4, and ln 3 or ln 4 once masked
    alike = Features(EYE[:1].expand(4, 4), EYE[:1].expand(4, 4))
    loss = one("icl")
    close(loss(Features(EYE, EYE), alike, torch.arange(4)), log(4))
    close(loss(Features(EYE, EYE), alike, torch.tensor([0, 0, 1, 2])), (log(3) + log(4)) / 2)


def test_crd_of_an_even_student():
    # teacher's logits (ln 3, 0): KL((3/4, 1/4) || (1/2, 1/2)) = ln 2 - H(3/4)
    teacher = Features(EYE[:2], EYE[:2])
    student = Features(EYE[:1].expand(2, 4), EYE[:1].expand(2, 4))
    close(
        one("crd", temperature=1 / log(3))(student, teacher, torch.arange(2)), 0.13081203594113697
    )


def test_gd_of_a_collapsed_student():
    # teacher: dL/dS = (P - I) / 2 with off-diagonal 1 / (1 + e), times I; student: rows of
    # dL/dS sum to zero and all features are alike, so its gradients vanish
    eye = EYE[:2, :2]
    student = Features(eye[:1].expand(2, 2), eye[:1].expand(2, 2))
    value = one("gd", temperature=1.0)(student, Features(eye, eye), torch.arange(2))
    close(value, 2 * (0.5 / (1 + e)) ** 2)


def test_afd_of_equal_fusions():
    loss = one("afd")
    with torch.no_grad():
        loss.fusion.weight.zero_()
    # 7 rows that all look alike: ln of the candidates left to rows of images 4, 1, 2, 2, 3, 2, 1
    expected = (2 * log(7) + 2 * log(6) + 3 * log(5)) / 7
    close(loss(random(0), random(1), IDS).detach(), expected)


# Gradients.


def autograd(features: Features, ids: torch.Tensor) -> Features:
    """What autograd gives for a loss written from torch's own cross-entropy."""
    image, text = (x.clone().requires_grad_() for x in features)
    own = torch.eye(len(ids), dtype=torch.bool)
    scores = (image @ text.T / TAU).masked_fill((ids[:, None] == ids) & ~own, -1e30)
    labels = torch.arange(len(ids))
    ((cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2).backward()
    return Features(image.grad, text.grad)


@pytest.mark.parametrize("ids", [torch.arange(B), IDS, torch.zeros(B, dtype=torch.int64)])
def test_closed_form_gradients_are_those_of_autograd(ids):
    for seed in range(5):
        ours, theirs = contrastive_gradients(random(seed), ids, TAU), autograd(random(seed), ids)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("part", ALL)
def test_each_part_has_the_gradient_of_its_value(part):
    loss, teacher = one(part, temperature=TAU).double(), random(1)
    inputs = tuple(x.requires_grad_() for x in random(0))
    inputs += tuple(loss.parameters())
    run = lambda image, text, *_: loss(Features(image, text), teacher, IDS)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("ids", [IDS, torch.zeros(B, dtype=torch.int64)])
def test_all_parts_with_own_images_masked_stay_finite(ids):
    loss = objectives.build("clip_kd", dim=D, parts=ALL, temperature=0.01)
    student, teacher = ([x.float().requires_grad_() for x in random(s)] for s in (0, 1))
    loss(Features(*student), Features(*teacher), ids).backward()
    assert all(x.grad.isfinite().all() for x in (*student, *loss.parameters()))
    assert all(x.grad is None for x in teacher)


@pytest.mark.parametrize("value", [0.0, D**-0.5])
@pytest.mark.parametrize("size", [1, 4])
def test_all_parts_are_finite_for_degenerate_features(value, size):
    loss = objectives.build("clip_kd", dim=D, parts=ALL)
    rows = [torch.full((size, D), value).requires_grad_() for _ in range(2)]
    total = loss(Features(*rows), Features(*rows), torch.arange(size))
    total.backward()
    assert total.isfinite()
    assert all(x.grad.isfinite().all() for x in rows)


def test_autocast_changes_nothing():
    student, teacher = (Features(*(x.float() for x in random(s))) for s in (0, 1))
    loss = objectives.build("clip_kd", dim=D, parts=ALL)
    expected = loss(student, teacher, IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher, IDS), expected)


def test_student_and_teacher_of_different_precision():
    student, teacher = random(0), random(1)
    half = Features(*(x.half() for x in teacher))
    value = objectives.build("clip_kd")(student, half, IDS)
    same = Features(*(x.double() for x in half))
    assert torch.equal(value, objectives.build("clip_kd")(student, same, IDS))


# Construction.


def test_afd_is_drawn_from_the_seed_alone():
    state = torch.get_rng_state()
    first, same, other = (one("afd", seed=seed).fusion for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, same.weight)
    assert torch.equal(first.bias, same.bias)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.shape == (2, D, 2 * D)
    assert 0 < first.weight.abs().max() <= (2 * D) ** -0.5
    assert not torch.equal(first.weight[0], first.weight[1])


def test_without_afd_there_is_nothing_to_learn_or_to_save():
    loss = objectives.build("clip_kd", dim=D, parts=ALL[:5])
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_a_deep_copy_fuses_with_its_own_layers():
    loss = one("afd")
    copied = deepcopy(loss)
    before = loss(random(0), random(1), IDS)
    with torch.no_grad():
        copied.fusion.weight.zero_()
    assert torch.equal(loss(random(0), random(1), IDS), before)
    assert not torch.equal(copied(random(0), random(1), IDS), before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": ["fd", "clr"]}, "no part named 'clr'"),
        ({"parts": ["mfd"]}, "Known: afd, crd, fd, gd, icl, task"),
        ({"parts": []}, "parts is empty; choose some of task, fd"),
        ({"parts": ["fd", "fd"]}, "names one twice"),
        ({"parts": "fd"}, "parts = 'fd' does not fit"),
        ({"weights": {"clr": 1.0}}, "no part named 'clr'"),
        ({"weights": {"gd": 1.0}}, "'gd', which is not among the parts"),
        ({"weights": {"fd": 0.0}}, "the weight of fd must be above 0"),
        ({"weights": {"fd": "much"}}, "weights = {'fd': 'much'} does not fit"),
        ({"parts": ["afd"]}, "give dim"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, said):
    with pytest.raises(ConfigError) as caught:
        objectives.build("clip_kd", **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
