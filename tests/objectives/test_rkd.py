from math import sqrt

import pytest
import torch
from placed import Operations
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.rkd import angles, distances, vectors
from crosstill.types import Features

LINE = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
EQUILATERAL = [[0.0, 0.0], [1.0, 0.0], [0.5, sqrt(0.75)]]


def close(value: torch.Tensor, expected: object, atol: float = 1e-9) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=atol)


def points(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def on_images(student: list[list[float]], teacher: list[list[float]], **weights: float):
    """The loss of one cloud; that of the captions is the teacher's own and pays nothing."""
    theirs = points(teacher)
    loss = objectives.build("rkd", **weights)
    return loss(
        Features(points(student), theirs), Features(theirs, theirs), torch.arange(len(student))
    )


def test_line_against_equilateral():
    # mean distance 4/3, so 3/4, 3/4, 3/2 against 1, 1, 1; halved squares 1/32, 1/32, 1/8, twice,
    # over 9 entries
    close(on_images(LINE, EQUILATERAL, distance=1.0, angle=0.0), 1 / 24)


def test_angles_of_line_against_equilateral():
    # the line's angles are 0 at both ends and 180 degrees in the middle, the triangle's 60: each
    # is counted twice; cosines 1, -1, 1 against 1/2; Huber 1/8, 1, 1/8; over 27 entries
    close(on_images(LINE, EQUILATERAL, distance=0.0, angle=1.0), 2 * (1 / 8 + 1 + 1 / 8) / 27)


def test_the_default_weights_are_those_of_the_paper():
    value = on_images(LINE, EQUILATERAL)
    close(value, 25 / 24 + 50 * 2 * 1.25 / 27)


def test_images_and_captions_are_clouds_of_their_own():
    line, triangle = points(LINE), points(EQUILATERAL)
    loss = objectives.build("rkd", distance=1.0, angle=0.0)
    ids = torch.arange(3)
    close(loss(Features(line, line), Features(triangle, triangle), ids), 2 / 24)
    close(loss(Features(line, triangle), Features(triangle, triangle), ids), 1 / 24)
    close(loss(Features(triangle, line), Features(triangle, line), ids), 0.0)


def test_a_scaled_rotated_shifted_copy_pays_nothing():
    random = torch.Generator().manual_seed(0)
    cloud = torch.randn(6, 4, generator=random, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64))
    copy = 3 * cloud @ turn + torch.randn(4, generator=random, dtype=torch.float64)
    for weights in ({"distance": 1.0, "angle": 0.0}, {"distance": 0.0, "angle": 1.0}):
        loss = objectives.build("rkd", **weights)
        close(loss(Features(cloud, copy), Features(copy, cloud), torch.arange(6)), 0.0, atol=1e-28)


STUDENT = [[1.0, 2.0, -1.0], [0.5, 0.0, 3.0], [0.5, 0.0, 3.0], [-2.0, 1.0, 1.0], [0.0, 0.0, 0.1]]
TEACHER = [[0.0, 1.0, 0.0], [2.0, 2.0, 1.0], [-1.0, 0.0, 4.0], [0.0, 1.0, 0.0], [5.0, -1.0, 2.0]]


def length(a: list[float], b: list[float]) -> float:
    return sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def cosine(cloud: list[list[float]], i: int, j: int, k: int) -> float:
    """Of the angle at i between j and k; 0 where two of them are one."""
    one, two = length(cloud[i], cloud[j]), length(cloud[i], cloud[k])
    if not one or not two:
        return 0.0
    sides = zip(cloud[i], cloud[j], cloud[k], strict=True)
    return sum((y - x) * (z - x) for x, y, z in sides) / one / two


def huber(x: float, y: float) -> float:
    return (x - y) ** 2 / 2 if abs(x - y) < 1 else abs(x - y) - 0.5


def mean_length(cloud: list[list[float]]) -> float:
    found = [length(a, b) for a in cloud for b in cloud]
    return sum(found) / sum(x > 0 for x in found)


def by_hand(student: list[list[float]], teacher: list[list[float]]) -> tuple[float, float]:
    size, far, turned = len(student), 0.0, 0.0
    for i in range(size):
        for j in range(size):
            ours = length(student[i], student[j]) / mean_length(student)
            far += huber(ours, length(teacher[i], teacher[j]) / mean_length(teacher))
            for k in range(size):
                turned += huber(cosine(student, i, j, k), cosine(teacher, i, j, k))
    return far / size**2, turned / size**3


def test_loops_over_numbers_agree_with_equal_points_in_both_clouds():
    far, turned = by_hand(STUDENT, TEACHER)
    close(on_images(STUDENT, TEACHER, distance=1.0, angle=0.0), far)
    close(on_images(STUDENT, TEACHER, distance=0.0, angle=1.0), turned)
    close(on_images(STUDENT, TEACHER), 25 * far + 50 * turned)


def test_pieces_by_hand():
    # sides 3, 4, 5 with mean 4; a right angle at the first point
    triangle = vectors(points([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    close(distances(triangle), [[0.0, 0.75, 1.0], [0.75, 0.0, 1.25], [1.0, 1.25, 0.0]])
    close(angles(triangle)[0], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    close(angles(triangle)[1], [[1.0, 0.0, 0.6], [0.0, 0.0, 0.0], [0.6, 0.0, 1.0]])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_equal_points_have_finite_value_and_gradient(rows):
    student = points([[0.6, 0.8]] * rows).requires_grad_()
    teacher = points([[float(i), 1.0] for i in range(rows)])
    loss = objectives.build("rkd")(
        Features(student, student), Features(teacher, teacher), torch.arange(rows)
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_equal_float32_points_among_others_are_exactly_equal():
    # |a|^2 + |b|^2 - 2ab of float32 rows would leave some distance between them
    rows = normalize(torch.randn(8, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    cloud = rows[[0, 1, 2, 3, 0, 1, 2, 3]]
    assert (distances(vectors(cloud)) == 0).sum() == 16


def test_a_large_batch_takes_as_many_operations_as_a_small_one():
    counts = []
    for size in (4, 64):
        random = torch.Generator().manual_seed(0)
        rows = [normalize(torch.randn(size, 512, generator=random), dim=1) for _ in range(4)]
        student, loss = Features(*(x.requires_grad_() for x in rows[:2])), objectives.build("rkd")
        with Operations() as operations:
            loss(student, Features(*rows[2:]), torch.arange(size)).backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]  # no loop over rows: 0.07 s on one thread of a Xeon at 2.8 GHz
    assert operations.largest <= 64 * 64 * 512  # all differences of two rows, never of three


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("option", ["distance", "angle"])
def test_impossible_weights_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be 0 or above"):
        objectives.build("rkd", **{option: value})


def test_two_weights_of_zero_are_refused():
    with pytest.raises(ConfigError, match="distance and angle are both 0"):
        objectives.build("rkd", distance=0.0, angle=0.0)
