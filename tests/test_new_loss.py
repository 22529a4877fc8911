"""docs/new-loss.md is true: its loss and its test work as they stand there."""

import re
from pathlib import Path

import pytest

from crosstill import objectives
from crosstill.train import train

PAGE = Path(__file__).parent.parent / "docs/new-loss.md"


@pytest.fixture
def blocks(tmp_path, monkeypatch) -> list[str]:
    """The page's code, its loss placed where `objectives` looks, and nothing else edited."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "huber.py").write_text(found[0])
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    return found


def test_the_loss_is_found_and_its_test_passes(blocks):
    assert "huber" in objectives.known()
    scope: dict = {}
    exec(blocks[1], scope)
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_a_run_trains_with_it(blocks, cached, student, settings, tmp_path):
    changes = ['losses=["huber", "contrastive"]', "losses.huber.delta=0.1", "epochs=1"]
    run = train(student, cached, settings.changed(changes), tmp_path / "run")
    assert run.metrics["steps"] == 10


def test_it_takes_no_more_than_forty_lines(blocks):
    assert len(blocks[0].splitlines()) <= 40
