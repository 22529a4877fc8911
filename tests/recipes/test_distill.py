"""`crosstill.distill`: from the name of a student to a run, and on with a run that is there."""

import pytest
import torch

import crosstill
from crosstill.errors import ConfigError
from support import FAST, small_config
from verbs import TOML


@pytest.fixture(scope="module")
def run(cached, tmp_path_factory):
    out = tmp_path_factory.mktemp("named") / "run"
    return crosstill.distill(small_config(), cached.folder, "clip_kd", out=out, changes=FAST[:-1])


def test_a_described_student_is_as_wide_as_the_teacher_and_has_the_words_of_the_captions(
    run, cached, tmp_path
):
    built = crosstill.students.build(
        small_config(), dim=cached.dim, captions=cached.captions("train")
    )
    by_hand = crosstill.distill(built, cached, "clip_kd", out=tmp_path / "run", changes=FAST[:-1])
    assert run.best.dim == cached.dim
    weights, expected = run.best.state_dict(), by_hand.best.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert run.config["settings"] == by_hand.config["settings"]


def test_a_student_named_by_its_file(cached, tmp_path):
    (tmp_path / "small.toml").write_text(TOML)
    run = crosstill.distill(tmp_path / "small.toml", cached, out=tmp_path / "run", changes=FAST)
    assert run.best.name == "small"
    assert run.config["settings"]["recipe"] == "recommended"


def test_a_resumed_run_keeps_recipe_and_settings_unless_others_are_named(run, cached):
    again = crosstill.distill(None, cached, out=run.folder, resume=True)
    assert again.config["settings"]["recipe"] == "clip_kd"
    with pytest.raises(ConfigError, match="was started with clip_kd, which a resumed run keeps"):
        crosstill.distill(None, cached, "kd", out=run.folder, resume=True)
    with pytest.raises(ConfigError, match="a run keeps its student; give None"):
        crosstill.distill("tiny", cached, out=run.folder, resume=True)


def test_a_run_in_the_way_is_refused_before_a_student_is_fetched(run, cached):
    with pytest.raises(ConfigError, match="already holds a run"):
        crosstill.distill("no-such-preset", cached, out=run.folder)
