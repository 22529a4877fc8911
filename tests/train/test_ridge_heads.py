import torch

from crosstill.train import train
from crosstill.train.ridge_heads import _fit, _put, solve


def test_ridge_finds_a_linear_map_and_shrinks_with_the_penalty():
    torch.manual_seed(0)
    x, true = torch.randn(500, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(solve(x, x @ true, penalty=1e-12), true)
    # one column of ones: the answer is mean(y) / (1 + penalty), by hand
    ones, y = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    torch.testing.assert_close(solve(ones, y, penalty=0.5), torch.tensor([[2.0]]).double())


def test_a_bias_takes_the_offset():
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 2)
    x, offset = torch.randn(200, 3), torch.tensor([5.0, -7.0])
    with torch.no_grad():
        _put(head, _fit(x, x[:, :2] + offset, True))
    torch.testing.assert_close(head.bias, offset, atol=0.05, rtol=0)


def test_a_run_starts_ahead_with_ridge_heads(cached, student, settings, tmp_path):
    short = settings.changed(["epochs=1", "lr=1e-12"])
    plain = train(student, cached, short, tmp_path / "plain").metrics["best"]["rsum"]
    again = train(
        type(student).load(tmp_path / "plain/student"),
        cached,
        short.changed(["init_heads=ridge"]),
        tmp_path / "ridge",
    )
    assert again.metrics["best"]["rsum"] > plain
