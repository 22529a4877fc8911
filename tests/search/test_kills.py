import os
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
