"""Two processes must do what one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crosstill.cache import Cache
from crosstill.errors import ConfigError
from crosstill.train import checkpoint
from crosstill.train.distributed import Group
from support import matrix, mixed_cache, same, wait_for
from train import steady_run
from verbs import TOML

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
MIXED = ["losses.kd={}", "losses.info_nce={}", "paired_share=0.25", "losses.crd={}"]
CASES = [
    ("pairs", CHUNKS, []),
    ("mixed", MIXED, []),
    ("mixed", [*MIXED, *CHUNKS], []),
    ("unpaired", MIXED[:1], []),
    ("pairs", CHUNKS, TORCHRUN),
    ("pairs", [], TORCHRUN),
]


@pytest.fixture(scope="module")
def sources(cached, scenes, tmp_path_factory) -> dict[str, Cache]:
    """Caches of pairs, of pairs with bare photos and loose texts, and of these alone."""
    home = tmp_path_factory.mktemp("sources")
    mixed, unpaired = (mixed_cache(scenes, home / str(every), every) for every in (3, 0))
    return {"pairs": cached, "mixed": mixed, "unpaired": unpaired}


def launch(cached, out: Path, starter: list[str], changes: list[str]) -> checkpoint.State:
    """Run two processes, by torchrun or forked."""
    out.mkdir()
    command = [sys.executable, *starter, str(RUNNER), str(cached.folder), str(out), *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if starter else {"FORKS": "2"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return checkpoint.load_latest(out / "checkpoints")


@pytest.mark.parametrize(("source", "changes", "starter"), matrix(CASES, CASES[:2]))
def test_two_processes_do_what_one_does(sources, tmp_path, source, changes, starter):
    """The same gradient, and after an epoch the same queue to the bit."""
    cached = sources[source]
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


def descendants(process: int) -> list[int]:
    """Every process that this one started, and those that they started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


@pytest.mark.slow
def test_two_killed_processes_go_on_through_the_command_line(sources, tmp_path):
    (tmp_path / "small.toml").write_text(TOML)
    changes = [*MIXED, "losses.contrastive.queue_size=50", "batch_size=16", "epochs=2"]
    changes += ["steps_per_epoch=12", "save_every=3", "lr=1e-3"]
    options = [word for change in changes for word in ("--set", change)]
    new = ["--student", tmp_path / "small.toml", "--recipe", "dsmd", *options]

    def start(out: str, *words: object) -> subprocess.Popen[bytes]:
        typed = ["-m", "crosstill", "train", sources["mixed"].folder, "--out", tmp_path / out]
        command = [sys.executable, *TORCHRUN, *typed, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{out}.log").open("ab") as log:
            return subprocess.Popen(map(str, command), env=environment, stdout=log, stderr=log)

    whole, cut = start("whole", *new), start("cut", *new)
    wait_for(lambda: any((tmp_path / "cut/checkpoints").glob("*.json")) or cut.poll() is not None)
    for process in (*descendants(cut.pid), cut.pid):
        os.kill(process, signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "cut/metrics.json").exists(), "it was over before it was killed"
    assert start("cut", "--resume").wait() == whole.wait() == 0, (tmp_path / "cut.log").read_text()
    ends = [checkpoint.load_latest(tmp_path / out / "checkpoints") for out in ("cut", "whole")]
    for part in ("student", "losses", "balance"):
        assert same(ends[0][part], ends[1][part]), part
    assert ends[0]["position"] == ends[1]["position"]
