"""The default recipe, on every kind of cache, through the command line."""

import json
from pathlib import Path

import pytest

from crosstill import recipes
from crosstill.cache import build
from crosstill.train import Run
from support import SmallTeacher
from verbs import TOML, crosstill

QUICK = ("epochs=1", "steps_per_epoch=2", "batch_size=8", "lr=1e-3")


def trained(folder: Path, out: Path, *changes: str) -> dict:
    """Train without --recipe; the run's settings."""
    (out.parent / "small.toml").write_text(TOML)
    sets = [word for change in (*QUICK, *changes) for word in ("--set", change)]
    crosstill("train", folder, "--student", out.parent / "small.toml", *sets, "--out", out)
    assert Run(out).metrics["best"]["epoch"] == 1
    return json.loads((out / "config.json").read_text())["settings"]


def test_it_is_what_a_run_without_a_recipe_has(cached, tmp_path):
    settings = trained(cached.folder, tmp_path / "run", "losses.hard_negative.margin=0.3")
    assert settings["recipe"] == "recommended"
    assert set(settings["losses"]) == {*recipes.dsmd().losses, "info_nce"}
    assert settings["losses"]["hard_negative"] == {"margin": 0.3}
    assert settings["balance"]["name"] == "dsmd"


@pytest.mark.parametrize(
    ("side", "losses"),
    [("image", {"feature", "instance", "info_nce"}), ("none", {"info_nce"})],
)
def test_it_leaves_out_what_the_cache_cannot_serve(scenes, tmp_path, side, losses):
    teacher = SmallTeacher()
    teacher.modalities = frozenset({side})
    build(teacher if side != "none" else None, scenes, tmp_path / "cache")
    settings = trained(tmp_path / "cache", tmp_path / "run")
    assert (settings["recipe"], set(settings["losses"])) == ("recommended", losses)
