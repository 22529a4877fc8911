"""From a dual encoder to a fusion teacher, its half, and a dual encoder that learnt from it."""

import json
import shutil
from pathlib import Path

import pytest

from crosstill import data, students, teachers
from crosstill.data import scenes as scenery
from crosstill.train import Run
from support import lengthen, small_config
from verbs import TOML, crosstill, refusal

METER = """
fusion = "meter"
name = "meter"
towers = "{towers}"
[shape]
layers = 4
width = 16
heads = 2
mlp = 16
dropout = 0.0
"""
SHORT = ["epochs=1", "steps_per_epoch=3", "batch_size=8"]
SET = [word for change in SHORT for word in ("--set", change)]
SCENES = "scenes:60"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Everything that the commands of docs/fusion.md make, very small."""
    home = tmp_path_factory.mktemp("fusion")
    texts = [text for example in data.open(SCENES).examples for text in example.captions]
    students.build(small_config(), dim=16, captions=texts).save(home / "dual")
    (home / "meter.toml").write_text(METER.format(towers=home / "dual"))
    crosstill("cache", home / "dual", SCENES, "--out", home / "features")
    few = ["--false", 12, "--false-images", 8]
    find = ["--find", home / "features"]
    crosstill("cache", "none", SCENES, "--out", home / "listed", *few, *find)
    fresh = ["--student", home / "meter.toml", "--recipe", "info_nce"]
    crosstill("train", home / "listed", *fresh, "--out", home / "meter", *SET)
    crosstill("cache", home / "meter", SCENES, "--out", home / "scores", *few)
    for out, options in {"half": ["--student", "half"], "first": ["--layers", "0"]}.items():
        crosstill("train", home / "scores", *options, "--recipe", "dcd", "--out", home / out, *SET)
    for recipe in ("dcd", "cprd"):
        (home / "small.toml").write_text(TOML)
        small = ["--student", home / "small.toml", "--recipe", recipe]
        crosstill("train", home / "scores", *small, "--out", home / recipe, *SET)
    return home


def test_students_of_a_fusion_teacher(home):
    assert Run(home / "half").matcher.depth == 2
    assert Run(home / "first").matcher.depth == 1
    assert Run(home / "dcd").best.dim > 0 and Run(home / "cprd").best.dim > 0
    assert Run(home / "half").config["teacher"]["kind"] == "fusion"
    whole, half = teachers.load(home / "meter/best"), Run(home / "half").matcher
    assert half.towers_digest() == whole.towers_digest()


def test_all_of_them_in_one_table(home):
    found = crosstill(
        "evaluate", home / "meter", SCENES, "--beside", home / "half", "--beside", home / "dcd",
        "--efficiency", "--json",
    )  # fmt: skip
    rows = json.loads(found.stdout)
    half, dual = rows["beside"]
    assert min(row["rsum"] for row in (rows, half, dual)) > 0
    costs = [row["cost"] for row in (rows, half, dual)]
    assert [cost["passes"] for cost in costs] == [6 * 30, 6 * 30, 6 + 30]


def test_the_dual_students_finds_are_reranked(home):
    found = crosstill("evaluate", home / "half", SCENES, "--finder", home / "dcd", "--top", 5)
    assert [line.split("|")[1].strip() for line in found.stdout.splitlines()][-3:] == [
        "1",
        "5",
    ] or ("| 5" in found.stdout)


def test_a_run_is_taken_for_its_best(home):
    assert teachers.load(home / "meter").identity() == teachers.load(home / "meter/best").identity()
    assert "meter" in crosstill("inspect", home / "meter").stdout
    assert "crosstill student" in refusal("inspect", home / "dcd")
    beside = ["--set", f"teacher={home / 'meter'}", "--set", "drawn=9", *SET]
    out = home / "live"
    crosstill(
        "train", home / "scores", "--student", "half", "--recipe", "dcd", "--out", out, *beside
    )
    unfinished = home / "unfinished"
    shutil.copytree(home / "half", unfinished)
    shutil.rmtree(unfinished / "best")
    assert "--resume" in refusal("evaluate", unfinished, SCENES)


def test_resuming_a_fusion_run_needs_nothing_but_its_folder(home):
    told = crosstill("train", home / "scores", "--out", home / "half", "--resume")
    assert "best val RSUM" in told.stdout
    assert "crosstill report" in told.stderr and "crosstill export" not in told.stderr


def test_wrong_input_is_one_line(home, tmp_path):
    never = ["--out", tmp_path / "never"]
    wrong = METER.format(towers=home / "dual").replace("layers", "layres")
    (home / "wrong.toml").write_text(wrong)
    (home / "fused.toml").write_text(METER.format(towers=home / "meter"))
    cases = {
        (home / "scores", "--recipe", "dsmd", "--student", home / "small.toml"): "score cache",
        (home / "features", "--student", "half", "--recipe", "dcd"): "score cache",
        (home / "scores", "--layers", "0,4", "--recipe", "dcd"): "fusion layers 0 to 3",
        (home / "scores", "--layers", "1,1", "--recipe", "dcd"): "fusion layers 0 to 3",
        (home / "listed", "--student", "half", "--recipe", "info_nce"): "no teacher to cut",
        (home / "listed", "--student", home / "small.toml", "--recipe", "dcd"): "without a teacher",
        (home / "scores", "--student", "half", "--recipe", "dcd", "--set",
         "losses.dcd.hardest=13"): "hardest = 13",
        (home / "meter", "--student", "half", "--recipe", "dcd"): "cache",
        (home / "scores", "--layers", "x", "--recipe", "dcd"): "--layers x",
        (home / "scores", "--layers", "0", "--student", "half", "--recipe", "dcd"): "leave",
        (home / "scores", "--student", "half", "--resume"): "keeps its student",
        (home / "scores", "--student", home / "small.toml", "--recipe", "dcd", "--set",
         "towers=train"): "use freeze",
        (home / "listed", "--student", home / "wrong.toml", "--recipe", "info_nce"): "'layres'",
        (home / "listed", "--student", home / "fused.toml", "--recipe", "info_nce"): "no dual",
    }  # fmt: skip
    for arguments, message in cases.items():
        told = refusal("train", *arguments, *never)
        assert message in told, told
        assert not (tmp_path / "never").exists()
    told = refusal("train", home / "listed", "--out", home / "half", "--resume")
    assert "another cache (teacher, dataset or candidates differ" in told
    told = refusal("cache", home / "meter", "scenes:40", "--out", home / "scores")
    assert "another" in told
    assert "fusion" in refusal("cache", home / "meter", SCENES, "--dtype", "fp32", *never)


def test_captions_that_a_fusion_model_cuts_are_counted(home, tmp_path, caplog):
    scenery.write(tmp_path / "photos", 20)
    listing = lengthen(tmp_path / "photos/dataset.json", tmp_path / "long.json")
    place = (listing, "--images", tmp_path / "photos")
    few = ("--false", 3, "--false-images", 2)
    cut = "captions longer than a model reads, cut: "
    crosstill("cache", home / "meter", *place, "--out", tmp_path / "scores", *few)
    assert f"{cut}meter 20 of 100" in caplog.messages
    finder = ("--finder", home / "dual", "--top", 2, "--split", "train")
    told = crosstill("evaluate", home / "meter", *place, *finder).stderr
    assert cut in told and told.count(" of 80") == 2
