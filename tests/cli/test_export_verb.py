"""`crosstill export`, and what else takes a bundle, as the command line has them."""

import json

import pytest

from crosstill import cache
from export.small import take_graphs
from verbs import crosstill, refusal


@pytest.fixture(scope="module")
def bundle(run_folder, run_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "bundle"
    licence = ("--data-licence", "cc-by-nc-sa-4.0")
    with pytest.MonkeyPatch.context() as patch:
        take_graphs(patch, run_bundle)
        done = crosstill("export", run_folder, "--to", "onnx", "--out", out, *licence)
    assert done.stdout.strip() == str(out)
    assert "fp32: least cosine 1.0000000" in done.stderr and "RSUM" in done.stderr
    return out


def test_the_card_has_the_licence_that_was_given(bundle):
    card = (bundle / "README.md").read_text()
    assert "cc-by-nc-sa-4.0" in card and "Not for commercial use" in card


def test_a_bundle_is_evaluated_beside_its_run(run_folder, bundle):
    done = crosstill(
        "evaluate", run_folder, "scenes:60", "--split", "val", "--beside", bundle, "--json"
    )
    found = json.loads(done.stdout)
    assert found["beside"][0]["rsum"] == pytest.approx(found["rsum"], abs=1e-6)
    assert found["beside"][0]["parameters"] == found["parameters"]


def test_a_bundle_is_a_teacher(bundle, tmp_path):
    crosstill("cache", bundle, "scenes:20", "--out", tmp_path / "cache")
    told = cache.open(tmp_path / "cache")
    assert told.dim == 16 and told.teacher["identity"]["family"] == "crosstill-bundle"


def test_wrong_input(run_folder, bundle, tmp_path):
    run, out = run_folder, tmp_path / "out"
    assert "no form of export named 'onxx'" in refusal(
        "export", run_folder, "--to", "onxx", "--out", out
    )
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


def test_a_run_that_is_not_finished(run_folder, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_bytes((run_folder / "config.json").read_bytes())
    assert "the run is not finished" in refusal("export", half, "--out", tmp_path / "out")
