"""The report of runs that learnt from a score cache: dual encoders and fusion models."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pages import Page

from ablate.scored import score_cache
from crosstill import data, files, fusion, report, students
from crosstill.errors import InputError, MismatchError
from crosstill.fusion import lists
from crosstill.fusion.scores import ScoreCache
from crosstill.fusion.states import Sides
from crosstill.train import Run, TrainConfig, train
from support import small_config

SETTINGS = {
    "losses": {"dcd": {"hardest": 3}},
    "balance": "fixed",
    "epochs": 2,
    "steps_per_epoch": 3,
    "batch_size": 8,
    "lr": 1e-3,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A score cache of sixty scenes, and a finished run of each kind of student."""
    home = tmp_path_factory.mktemp("report")
    cache = score_cache(home, 60)
    dual = students.build(small_config(), dim=16, captions=cache.texts)
    half = fusion.build("half", teacher=cache.teacher["source"])
    for name, student in {"dual": dual, "fused": half}.items():
        train(student, cache, TrainConfig(**SETTINGS), home / name)
        report.write(home / name)
    return home


def shown(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def figures(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def titles(run: Path) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", (run / "report.html").read_text())


def test_a_dual_encoder_is_shown_without_its_teacher(home):
    run = home / "dual"
    assert titles(run) == [
        "Recall",
        "Learning curve",
        "Losses",
        "Weights",
        "Feature space",
        "What they find",
        "How it was made",
    ]
    text = shown(run).text
    assert "No teacher's row, space or finds: the cache holds a fusion teacher's scores" in text
    assert "there is no teacher's row to compare it with" in text
    assert "The teacher's row is from the cache" not in text
    assert "ms/image" in text  # the student's alone
    found = figures(run)
    assert found["student"]["rsum"] == pytest.approx(Run(run).metrics["best"]["rsum"])
    assert "teacher" not in found and set(found["variance_shown"]) == {"student"}
    assert len(shown(run).all("li")) == 10 * 5


def test_a_fusion_model_is_shown_without_embeddings(home):
    run = home / "fused"
    assert titles(run) == ["Recall", "Learning curve", "Losses", "Weights", "How it was made"]
    found, metrics = figures(run), Run(run).metrics
    assert found["student"]["rsum"] == pytest.approx(metrics["best"]["rsum"], abs=1e-6)
    assert found["student"]["parameters"] == metrics["parameters"]["total"]
    assert found["teacher"]["rsum"] == pytest.approx(metrics["teacher"]["rsum"])
    assert found["untrained"]["rsum"] > 0 and found["variance_shown"] == {}
    text = shown(run).text
    parts = metrics["parameters"]
    assert f"{parts['towers']:,} are in its towers and {parts['fusion']:,} in its" in text
    assert "student (fused)" in text and "teacher (meter)" in text
    assert f"crosstill evaluate {run} DATA --split val --efficiency" in text
    assert "ms/image" not in text and not shown(run).all("li")
    alts = [image["alt"] for image in shown(run).all("img")]
    assert len([alt for alt in alts if alt.startswith("Loss dcd at 6 logged steps")]) == 1
    (curve,) = [alt for alt in alts if alt.startswith("RSUM on val after 2 epochs")]
    assert f"The teacher's is {found['teacher']['rsum']:.2f}" in curve


def test_it_says_that_recall_is_among_candidates_and_so_do_its_tables(home):
    run, cache = home / "fused", ScoreCache(home / "scores")
    said = cache.caveat(cache.split("val"))
    assert said in shown(run).text and said in (run / "table.md").read_text()
    assert said in figures(run)["notes"]
    assert "of its RSUM among the listed candidates on the 6 images" in figures(run)["summary"]


def test_the_untrained_student_is_the_one_before_training(home):
    cache = ScoreCache(home / "scores")
    val, half = cache.split("val"), fusion.build("half", teacher=cache.teacher["source"])
    half.freeze_towers()
    recall = lists.MatchedSplit(cache, val, Sides(half, cache, val)).recall(half)
    assert figures(home / "fused")["untrained"]["rsum"] == pytest.approx(recall.rsum)


@pytest.mark.slow
def test_a_fusion_model_that_no_teacher_taught(home, tmp_path):
    cache = fusion.build_scores(None, data.open("scenes:60"), tmp_path / "listed", false=8)
    half = fusion.build("half", teacher=str(home / "meter"))
    changes = {"losses": {"info_nce": {"hardest": 3}}, "epochs": 1, "towers": "train"}
    train(half, cache, TrainConfig(**SETTINGS | changes), tmp_path / "run")
    text = Page(report.write(tmp_path / "run").read_text()).text
    assert "No teacher's row: the cache holds candidates that no teacher scored." in text
    assert "there is no teacher to compare it with" in text
    assert "teacher" not in figures(tmp_path / "run")


@pytest.mark.parametrize("name", ["dual", "fused"])
def test_a_score_cache_that_is_gone_or_another(home, tmp_path, name):
    shutil.copytree(home / name, tmp_path / "run")
    record = Run(home / name).config

    def refused(error: type[Exception], folder: str, digest: str) -> str:
        changed = record | {"cache": {"folder": folder, "digest": digest}}
        files.write_json(tmp_path / "run/config.json", files.sealed(changed))
        with pytest.raises(error) as caught:
            report.write(tmp_path / "run")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "gone; put it back" in refused(InputError, str(tmp_path / "gone"), "0")
    assert "is no longer the cache" in refused(MismatchError, str(home / "scores"), "0")
