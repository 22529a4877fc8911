"""`crosstill export`, and what else takes a bundle, as the command line has them."""

import json

import pytest

from crosstill import cache, data, recipes
from support import FAST, SmallTeacher, small_student
from verbs import crosstill, refusal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short finished run with its cache."""
    place = tmp_path_factory.mktemp("run")
    told = cache.build(SmallTeacher(), data.open("scenes:60"), place / "cache")
    return recipes.distill(
        small_student(told), told, "clip_kd", out=place / "run", changes=FAST
    ).folder


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "bundle"
    done = crosstill("export", run, "--to", "onnx", "--out", out, "--data-licence", "cc-by-nc-4.0")
    assert done.stdout.strip() == str(out)
    assert "fp32: least cosine 1.0000000" in done.stderr and "RSUM" in done.stderr
    return out


def test_the_card_has_the_licence_that_was_given(bundle):
    card = (bundle / "README.md").read_text()
    assert "cc-by-nc-4.0" in card and "Not for commercial use" in card


def test_a_bundle_is_evaluated_beside_its_run(run, bundle):
    done = crosstill("evaluate", run, "scenes:60", "--split", "val", "--beside", bundle, "--json")
    found = json.loads(done.stdout)
    assert found["beside"][0]["rsum"] == pytest.approx(found["rsum"], abs=1e-6)
    assert found["beside"][0]["parameters"] == found["parameters"]


def test_a_bundle_is_a_teacher(bundle, tmp_path):
    crosstill("cache", bundle, "scenes:20", "--out", tmp_path / "cache")
    told = cache.open(tmp_path / "cache")
    assert told.dim == 16 and told.teacher["identity"]["family"] == "crosstill-bundle"


def test_wrong_input(run, bundle, tmp_path):
    out = tmp_path / "out"
    assert "no form of export named 'onxx'" in refusal("export", run, "--to", "onxx", "--out", out)
    assert "has no 8-bit form" in refusal(
        "export", run, "--to", "transformers", "--int8", "--out", out
    )
    assert "--max-loss 7.0: a share" in refusal("export", run, "--max-loss", 7, "--out", out)
    assert "only a student of ours" in refusal("export", bundle, "--out", out)
    said = refusal("export", run, "--to", "transformers", "--out", out)
    assert "pooled by" in said and "sentence-transformers or as onnx" in said
    assert "no such" in refusal("export", tmp_path / "nothing", "--out", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    assert "holds thesis.tex" in refusal("export", run, "--out", tmp_path / "mine")
    assert not out.exists()


def test_a_run_that_is_not_finished(run, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "the run is not finished" in refusal("export", half, "--out", tmp_path / "out")
