import torch

from crosstill.students.student import Student
from crosstill.train import train
from crosstill.train.ridge_heads import solve


def test_least_squares_finds_a_linear_map_and_shrinks_with_the_penalty():
    torch.manual_seed(0)
    x, true = torch.randn(500, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(solve(x, x @ true, bias=False, penalty=1e-12)[0], true)
    # one column of ones: the answer is mean(y) / (1 + penalty), by hand
    ones, y = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    found, _ = solve(ones, y, bias=False, penalty=0.5)
    torch.testing.assert_close(found, torch.tensor([[2.0]]).double())


def test_a_bias_is_not_shrunk():
    torch.manual_seed(0)
    x, offset = torch.randn(200, 3), torch.tensor([5.0, -7.0])
    found, _ = solve(x - x.mean(0), x[:, :2] + offset, bias=True, penalty=100.0)
    torch.testing.assert_close(found[-1], x[:, :2].double().mean(0) + offset)


def test_the_penalty_is_that_of_least_error_when_each_row_is_left_out():
    """Generalised cross-validation chooses as leaving out row by row does, on plain data."""
    torch.manual_seed(0)
    x = torch.randn(60, 20, dtype=torch.float64)
    y = x @ torch.randn(20, 5, dtype=torch.float64) + 20 * torch.randn(60, 5, dtype=torch.float64)
    _, chosen = solve(x, y, bias=False)

    def error(penalty: float) -> float:
        total = 0.0
        for row in range(len(x)):
            rest = torch.arange(len(x)) != row
            scale = x.square().mean() * len(x) / (x[rest].square().mean() * rest.sum())
            fitted, _ = solve(x[rest], y[rest], bias=False, penalty=penalty * float(scale))
            total += float((x[row] @ fitted - y[row]).square().sum())
        return total

    assert error(chosen) < 1.02 * min(error(10**power) for power in (-3, -2, -1, 0, 1))
    assert chosen > 1e-2  # noise of this size wants a penalty, and without noise there is none
    assert solve(x, x[:, :5], bias=False)[1] < 1e-4


def test_heads_begin_from_least_squares_where_towers_are_pretrained(
    cached, student, settings, tmp_path
):
    short = settings.changed(["epochs=1", "lr=1e-12"])

    def rsum(name: str, tower: str, *changes: str) -> float:
        learner = Student.load(start)
        for side in ("image", "text"):
            part = getattr(learner.config, side).model_copy(update={"pretrained": side == tower})
            learner.config = learner.config.model_copy(update={side: part})
        run = train(learner, cached, short.changed(list(changes)), tmp_path / name)
        return run.metrics["best"]["rsum"]

    start = tmp_path / "start"
    student.save(start)
    random = rsum("random", "neither")
    assert random == rsum("random again", "image", "init_heads=random")
    ridge = rsum("both", "neither", "init_heads=ridge")
    image = rsum("image", "image")
    assert ridge > random and image not in (random, ridge)
