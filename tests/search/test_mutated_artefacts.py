"""Every name, number, text and file of a bundle, an index, a cache and a run, changed at random."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crosstill import cache, search
from crosstill.search import vector_index
from crosstill.train import TrainConfig, train
from support import SETTINGS, SmallTeacher, small_student

Note = Callable[[str, object], None]
TESTS = Path(__file__).parents[1]
MANY = int(os.environ.get("CROSSTILL_MUTANTS", "2500"))  # copies of each kind


def mutants(kind: str, artefact: Path, home: Path, seed: int, count: int, note: Note) -> None:
    """Open so many changed copies in a process of their own, and hold it to what is promised."""
    path = os.pathsep.join([str(TESTS), str(Path(__file__).parent), *filter(None, sys.path)])
    script = Path(__file__).parent / "mutated.py"
    done = subprocess.run(
        [sys.executable, *map(str, (script, kind, artefact, home, seed, count))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    note("mutants", {key: value for key, value in found.items() if key != "faults"})
    assert not found["faults"], "\n".join(found["faults"])[:5000]
    assert found["outcomes"].get("refused", 0) > count // 3
    assert found["memory"] < 1 << 30


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("cache", "run")]


@pytest.fixture(params=["bundle", "index", "index of codes", *SLOW])
def artefact(request, tmp_path, monkeypatch) -> tuple[str, Path]:
    if request.param == "index of codes":
        monkeypatch.setattr(vector_index, "FLAT_UP_TO", 0)
        bundle, photos = map(request.getfixturevalue, ("bundle_folder", "photos"))
        search.build(bundle, photos, tmp_path / "index")
        return "index", tmp_path / "index"
    if request.param == "run":
        cached = request.getfixturevalue("cached")
        settings = TrainConfig(**SETTINGS | {"epochs": 1})
        return "run", train(small_student(cached), cached, settings, tmp_path / "run").folder
    if request.param == "cache":
        # one of its own: runs leave files that an opened cache does not read beside the shared one
        scenes = request.getfixturevalue("scenes")
        return "cache", cache.build(SmallTeacher(), scenes, tmp_path / "cache").folder
    return request.param, request.getfixturevalue(f"{request.param}_folder")


def test_some_changed_artefacts(artefact, tmp_path, record_property):
    mutants(*artefact, tmp_path / "home", 1, 20, record_property)


@pytest.mark.slow
def test_many_changed_artefacts(artefact, tmp_path, record_property):
    mutants(*artefact, tmp_path / "home", 2, MANY, record_property)
