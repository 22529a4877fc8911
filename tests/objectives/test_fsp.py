import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives, recipes
from crosstill.errors import MismatchError
from crosstill.objectives.fsp import flow, gram
from crosstill.types import Features


def close(value: torch.Tensor, expected: object) -> None:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9)


def constant(number: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, number, dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(8, 6), (4, 3), (1, 1)])
def test_constant_maps_of_any_size(height, width):
    value = gram(constant(2, 5, 2, height, width), constant(3, 5, 3, height, width))
    close(value, constant(6, 5, 2, 3))


def test_loops_over_numbers_agree():
    random = torch.Generator().manual_seed(0)
    one = torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64)
    two = torch.randn(2, 2, 4, 5, generator=random, dtype=torch.float64)
    a, b = one.tolist(), two.tolist()
    by_hand = [
        [
            [
                sum(a[n][c][y][x] * b[n][d][y][x] for y in range(4) for x in range(5)) / 20
                for d in range(2)
            ]
            for c in range(3)
        ]
        for n in range(2)
    ]
    close(gram(one, two), by_hand)


def test_low_precision_maps_are_summed_in_float32():
    # bfloat16 would stop counting ones at 256
    ones = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    assert gram(ones, ones).dtype == torch.float32
    assert gram(ones, ones).item() == 1.0


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 3, 8, 3), (4, 3, 8, 6), (5, 3, 6, 8)])
def test_maps_of_different_size_are_refused(shape):
    with pytest.raises(MismatchError, match=r"have no Gram matrix: pool one") as error:
        gram(constant(2, 5, 2, 8, 6), constant(3, *shape))
    assert "\n" not in str(error.value)


def test_matrices_of_different_channels_are_refused():
    with pytest.raises(MismatchError, match=r"is \(1, 2, 3\) and the teacher's is \(1, 2, 4\)"):
        flow(constant(1, 1, 2, 3), constant(1, 1, 2, 4))


def test_flow_is_the_mean_squared_difference():
    close(flow(constant(1, 2, 3, 4), constant(1.5, 2, 3, 4)), 0.25)


IMAGE_S = [[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]]
TEXT_S = [[0.8, 0.6], [0.28, 0.96], [0.0, 1.0]]
IMAGE_T = [[0.8, -0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]]
TEXT_T = [[1.0, 0.0, 0.0], [0.6, 0.0, 0.8], [0.0, 0.6, -0.8]]


def features(image: list[list[float]], text: list[list[float]]) -> Features:
    return Features(*(torch.tensor(x, dtype=torch.float64) for x in (image, text)))


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_the_loss_compares_all_cosines_of_images_and_captions():
    # the teacher may be wider than the student: the matrices are (B, B) all the same
    by_hand = sum(
        (dot(IMAGE_S[i], TEXT_S[j]) - dot(IMAGE_T[i], TEXT_T[j])) ** 2
        for i in range(3)
        for j in range(3)
    )
    loss = objectives.build("fsp")
    value = loss(features(IMAGE_S, TEXT_S), features(IMAGE_T, TEXT_T), torch.arange(3))
    close(value, by_hand / 9)


def test_orthonormal_against_collapsed():
    # identity against all ones: N - 1 of N entries are off by 1
    eye = torch.eye(4, dtype=torch.float64)
    same = eye[:1].expand(4, 4)
    value = objectives.build("fsp")(Features(same, same), Features(eye, eye), torch.arange(4))
    close(value, 12 / 16)


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_the_recipes_weight_makes_it_count_beside_the_task(noise):
    """Sixty-four pairs whose cosines are those of a trained teacher, and a noisy student."""
    random = torch.Generator().manual_seed(0)
    draw = lambda: normalize(torch.randn(64, 256, generator=random), dim=1)  # noqa: E731
    shared = draw()
    teacher = Features(*(normalize(shared + draw(), dim=1) for _ in range(2)))
    student = Features(*(normalize(x + noise * draw(), dim=1).requires_grad_() for x in teacher))
    weights = recipes.fsp().balance["weights"]
    sizes = {}
    for name in ("fsp", "info_nce"):
        loss = objectives.build(name)(student, teacher, torch.arange(64))
        gradient = torch.autograd.grad(weights.get(name, 1.0) * loss, student)
        sizes[name] = torch.cat([side.flatten() for side in gradient]).norm().item()
    assert 0.02 < sizes["fsp"] / sizes["info_nce"] < 2.0
