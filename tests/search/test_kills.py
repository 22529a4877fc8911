import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_builds.py")
SLOW = [pytest.param(seed, 50, marks=pytest.mark.slow) for seed in (1000, 2000)]


@pytest.mark.parametrize(("seed", "kills"), [(0, 3), *SLOW])
def test_builds_killed_at_random_moments_leave_a_whole_index(tmp_path, seed, kills):
    """SIGKILL while reading, encoding, writing and switching: see the script."""
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, str(seed), str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) or kills < 50, "no kill fell behind a switch"


@pytest.fixture(scope="module")
def killer(tmp_path_factory) -> Path:
    """A library that kills the process into which it is preloaded at its n-th write."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    made = tmp_path_factory.mktemp("killer") / "killing_writes.so"
    source = SCRIPT.with_name("killing_writes.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("first", 150), ("update", 80), ("rebuild", 150)])
def test_a_build_killed_at_each_of_its_writes_leaves_a_whole_index(tmp_path, killer, kind, least):
    """SIGKILL in the middle of every write, before every flush, rename and removal."""
    done = subprocess.run(
        [sys.executable, SCRIPT.with_name("killed_writes.py"), tmp_path, kind],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(killer)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= least
