import numpy as np
import onnx
import pytest
import torch
from small import take_graphs

from crosstill import data, evaluate, export, students, teachers
from crosstill.bundle import Bundle, calibration
from crosstill.errors import ConfigError, ExportError, ModelError
from crosstill.export import gates, onnx_bundle, provenance
from crosstill.train import Run
from support import small_student


@pytest.fixture(scope="module")
def run(run_folder):
    return Run(run_folder)


@pytest.fixture(scope="module")
def bundle(run, run_bundle, tmp_path_factory):
    """The run's bundle in fp32, and what the gates said."""
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    with pytest.MonkeyPatch.context() as patch:
        take_graphs(patch, run_bundle)
        return export.onnx(run, out, command="crosstill export")


def test_the_bundle_is_the_student(run, bundle):
    model = evaluate.open_model(bundle.folder)
    found = gates.compare(run.best, model, None)
    assert found.cosine >= gates.LEAST_COSINE and found.probes > 20
    assert model.dim == run.best.dim
    assert model.parameter_count() == run.best.parameter_count()
    assert model.preprocess == run.best.preprocess
    assert "fp32: least cosine 1.0000000" in bundle.lines[0]


def test_recall_is_that_of_the_student(run, bundle):
    pairs = data.open("scenes:60").split("val")
    there = evaluate.retrieval(run.best, pairs).recall
    here = evaluate.retrieval(teachers.load(bundle.folder), pairs).recall
    assert here.rsum == pytest.approx(there.rsum, abs=1e-6)


def test_the_card_says_what_counts(run, bundle):
    card = (bundle.folder / "README.md").read_text()
    assert "small" in card and "cc-by-nc-4.0" in card and "apache-2.0" in card
    assert "Not for commercial use" in card
    assert "| teacher | val |" in card and "| student | val |" in card
    assert Bundle.open(bundle.folder).fingerprint in card
    assert "    crosstill export" in card
    assert Bundle.open(bundle.folder).record["licences"]["data"] == "cc-by-nc-4.0"


def test_eight_bits_are_judged_by_recall(run, bundle, tmp_path, monkeypatch):
    take_graphs(monkeypatch, bundle.folder)
    monkeypatch.setattr(
        onnx_bundle, "_TABLE", 1
    )  # so that the small table of embeddings is rounded
    made = export.onnx(run, tmp_path / "int8", int8=True, max_loss=1.0)
    opened = Bundle.open(made.folder)
    assert opened.precision == "int8" and any("int8:" in line for line in made.lines)
    assert "This export is int8" in (made.folder / "README.md").read_text()
    small = (made.folder / "text.onnx").stat().st_size
    large = (bundle.folder / "text.onnx").stat().st_size
    assert small < large
    held = {i.name: i.data_type for i in onnx.load(made.folder / "text.onnx").graph.initializer}
    assert any(name.endswith("embeddings.weight.int8") for name in held)
    assert not any(name.endswith("word_embeddings.weight") for name in held)
    texts = [text for example in data.open("scenes:60").examples for text in example.captions]
    rows = [teachers.load(made.folder).embed_texts(texts), run.best.embed_texts(texts)]
    assert (rows[0] * rows[1]).sum(1).min() > 0.97
    assert calibration(opened)[0].shape[1] == run.best.dim


def test_too_great_a_loss_is_refused_with_figures(run, bundle, tmp_path, monkeypatch):
    take_graphs(monkeypatch, bundle.folder)
    monkeypatch.setattr(gates.Recalls, "loss", property(lambda self: 0.0123))
    with pytest.raises(ExportError, match=r"int8 loses 1\.23% of the RSUM .* allows 1\.00%"):
        export.onnx(run, tmp_path / "out", int8=True)
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_another_graph_is_refused_with_figures(run, bundle_folder, tmp_path, monkeypatch):
    take_graphs(monkeypatch, bundle_folder)  # of a student that was not trained
    with pytest.raises(ExportError, match=r"not the student: least cosine .*at least 0\.99999"):
        export.onnx(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_lost_mask_is_refused_with_figures(run, tmp_path, monkeypatch):
    def without_mask(tower, input_ids, attention_mask):
        return tower.student.embed_text(tower.student.pool_text(input_ids, input_ids * 0 + 1))

    monkeypatch.setattr(onnx_bundle._Texts, "forward", without_mask)
    with pytest.raises(ExportError, match=r"not the student: least cosine .*at least 0\.99999"):
        export.onnx(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_student_alone_has_no_recall(cached, bundle_folder, tmp_path, monkeypatch):
    take_graphs(monkeypatch, bundle_folder)
    made = export.onnx(small_student(cached), tmp_path / "alone")
    assert calibration(Bundle.open(made.folder)) is None
    with pytest.raises(ConfigError, match="--int8: is judged by its recall.*give --data"):
        export.onnx(small_student(cached), tmp_path / "other", int8=True)


def test_best_of_a_run_finds_its_run(run):
    found = provenance.find(run.best)
    assert found.split == "val" and len(found.pairs) == 6
    assert found.teacher["name"] == "small" and found.teacher_recall is not None


def test_wrong_input(run, bundle, tmp_path):
    with pytest.raises(ConfigError, match="no form of export named 'onx'; did you mean 'onnx'"):
        export.run(run, "onx", tmp_path / "x")
    with pytest.raises(ConfigError, match="--int8: transformers has no 8-bit form"):
        export.transformers(run, tmp_path / "x", int8=True)
    with pytest.raises(ConfigError, match=r"--max-loss 2: a share"):
        export.onnx(run, tmp_path / "x", max_loss=2)
    with pytest.raises(ModelError, match="only a student of ours"):
        export.onnx(bundle.folder, tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which no export wrote"):
        export.onnx(run, tmp_path / "mine")


@pytest.mark.slow
def test_a_convolutional_student(cached, tmp_path):
    """A ResNet has batch norms and no pooler of rows."""
    tiny = students.build("tiny", dim=16, captions=cached.texts)
    made = export.onnx(tiny, tmp_path / "tiny")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    rows = teachers.load(made.folder).embed_images(pixels)
    assert np.allclose(rows, tiny.embed_images(pixels), atol=1e-5)
