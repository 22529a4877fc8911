"""Files that ask for gigabytes or minutes get neither."""

import json
import subprocess
import sys

import bombs
import pytest


@pytest.fixture(scope="module")
def defused(tmp_path_factory) -> dict[str, dict]:
    """What reading each bomb took, one after the other in a process of their own."""
    folder = tmp_path_factory.mktemp("bombs")
    paths = []
    for number, make in enumerate(bombs.ALL.values()):
        paths.append(folder / f"{number}")
        paths[-1].write_bytes(make())
    command = [sys.executable, bombs.__file__, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=120)
    return dict(zip(bombs.ALL, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", bombs.TOO_LARGE)
def test_a_header_that_claims_too_much_is_refused(defused, name):
    assert defused[name]["found"].startswith("too many")
    assert defused[name]["seconds"] < 1


@pytest.mark.parametrize("name", bombs.SWELLING)
def test_what_would_swell_does_not(defused, name):
    found = defused[name]["found"]
    assert found in ("8x8x3", "24x32x3") or found.startswith(("corrupt", "truncated"))
    assert defused[name]["seconds"] < 5


def test_twenty_and_more_take_little_memory(defused):
    assert len(defused) >= 20
    rise = sum(row["rise"] for row in defused.values())  # of the peak, and so of all together
    assert rise < 50_000, defused  # KiB
