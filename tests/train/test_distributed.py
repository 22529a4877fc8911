"""Two processes must do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crosstill.errors import ConfigError
from crosstill.train import checkpoint
from crosstill.train.distributed import Group
from support import matrix
from train import steady_run

RUNNER = Path(steady_run.__file__)


def test_shares_are_equal_and_cover_the_batch():
    rows = list(range(12))
    parts = [rows[Group(rank, 3).slice_of(12)] for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert [row for part in parts for row in part] == rows


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch_size = 25 does not divide among 2"):
        Group(0, 2).check(25)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CHUNKS = ["chunk_size=5", "balance=uncertainty"]
CASES = [(CHUNKS, []), (CHUNKS, TORCHRUN), ([], TORCHRUN)]


def launch(cached, out: Path, starter: list[str], changes: list[str]) -> checkpoint.State:
    """Run two processes, by torchrun or forked."""
    out.mkdir()
    command = [sys.executable, *starter, str(RUNNER), str(cached.folder), str(out), *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if starter else {"FORKS": "2"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkpoint.load_latest(out / "checkpoints")


@pytest.mark.parametrize(("changes", "starter"), matrix(CASES, CASES[:1]))
def test_two_processes_do_what_one_does(cached, tmp_path, changes, starter):
    """The same gradient, and after an epoch the same queue to the bit."""
    (tmp_path / "one").mkdir()
    steady_run.run(cached, tmp_path / "one", changes)
    one = checkpoint.load_latest(tmp_path / "one/checkpoints")
    two = launch(cached, tmp_path / "two", starter, changes)
    assert one["position"] == two["position"]
    for name in ("entries", "ids", "pointer"):
        key = f"contrastive.queue.{name}"
        assert torch.equal(one["losses"][key], two["losses"][key])
    single = load_file(tmp_path / "one/gradient.safetensors")
    double = load_file(tmp_path / "two/gradient.safetensors")
    assert single.keys() == double.keys()
    size = max(gradient.abs().max() for gradient in single.values())
    for name, gradient in single.items():
        torch.testing.assert_close(double[name], gradient, atol=1e-6 * size.item(), rtol=1e-4)
