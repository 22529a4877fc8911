"""The default recipe, on every kind of cache, through the command line."""

import json
from pathlib import Path

import pytest

from ablate.scored import score_cache
from crosstill import data, recipes
from crosstill.cache import build
from crosstill.data import scenes as scenery
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


@pytest.mark.parametrize(
    ("every", "texts", "extra"), [(1, 0, set()), (6, 0, {"kd"}), (1, 400, {"kd"})]
)
def test_it_compares_rows_in_no_pair_across_modalities(tmp_path, every, texts, extra):
    """Every sixth photo has captions, or all have; and there are so many loose texts."""
    listing = scenery.write(tmp_path / "photos", 60)
    record = json.loads(listing.read_text())
    for number, item in enumerate(record["images"]):
        if number % every:
            item["sentences"] = []
    listing.write_text(json.dumps(record))
    loose = [f"sentence number {n}" for n in range(texts)]
    cache = build(SmallTeacher(), data.open(listing), tmp_path / "cache", texts=loose)
    losses = set(recipes.for_cache(cache, "encoder").losses)
    assert losses == {*recipes.dsmd().losses, "info_nce", *extra}


def test_from_a_score_cache_it_has_the_losses_of_lists(tmp_path):
    scores = score_cache(tmp_path, 30)
    assert set(recipes.for_cache(scores, "encoder").losses) == {"cprd"}
    assert set(recipes.for_cache(scores, "matcher").losses) == {"dcd"}
    settings = trained(scores.folder, tmp_path / "run", "losses.cprd.hardest=3")
    assert (settings["recipe"], set(settings["losses"])) == ("recommended", {"cprd"})
