import json
import shutil

import numpy as np
import pytest

from crosstill import bundle as bundles
from crosstill import files
from crosstill.bundle import Bundle, check_same
from crosstill.errors import CorruptError, MismatchError, ModelError


@pytest.fixture
def copy(bundle_folder, tmp_path):
    return shutil.copytree(bundle_folder, tmp_path / "bundle")


def test_what_it_says(bundle, bundle_folder):
    assert bundle.name == "small" and bundle.dim == 16 and bundle.precision == "fp32"
    assert bundle.preprocess.size == (16, 16) and bundle.max_length == 30
    assert set(bundle.identity) == {
        "weights",
        "preprocess",
        "tokenizer",
        "activation",
        "precision",
    }
    assert bundle.fingerprint == Bundle.open(bundle_folder).fingerprint
    assert {"bundle.json", "image.onnx", "text.onnx", "tokenizer.json"} <= set(bundle.files)


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
def test_half_a_bundle_is_refused_by_name(copy, name):
    (copy / name).unlink()
    with pytest.raises(ModelError, match=f"half a bundle, {name} is missing"):
        Bundle.open(copy)


def test_a_bundle_without_its_record(copy, tmp_path):
    (copy / "bundle.json").unlink()
    with pytest.raises(ModelError, match=r"half a bundle, bundle\.json is missing"):
        Bundle.open(copy)
    with pytest.raises(ModelError, match="no bundle; make one with `crosstill export"):
        Bundle.open(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        Bundle.open(tmp_path / "nothing")


def test_every_flipped_bit_is_seen(copy):
    draw = np.random.default_rng(0)
    for name in set(Bundle.open(copy).files) - {"README.md"}:
        whole = (copy / name).read_bytes()
        for _ in range(5):
            damaged = bytearray(whole)
            damaged[draw.integers(len(whole))] ^= 1 << int(draw.integers(8))
            (copy / name).write_bytes(damaged)
            with pytest.raises(CorruptError, match=name):
                Bundle.open(copy)
        (copy / name).write_bytes(whole)
    Bundle.open(copy)


def test_the_card_may_be_edited_and_left_out(copy, bundle):
    (copy / "README.md").write_text("mine")
    assert Bundle.open(copy).fingerprint == bundle.fingerprint
    (copy / "README.md").unlink()
    assert "README.md" not in Bundle.open(copy).files


def test_a_newer_format_is_refused(copy):
    record = json.loads((copy / "bundle.json").read_text())
    files.write_json(copy / "bundle.json", files.sealed({**record, "format": 99}))
    with pytest.raises(CorruptError, match="format 99 is unknown here"):
        Bundle.open(copy)


def test_a_mismatch_names_the_parts(bundle):
    check_same(bundle.identity, dict(bundle.identity), "x")
    other = {**bundle.identity, "weights": "0", "precision": "int8"}
    with pytest.raises(MismatchError, match=r"^photos: not the same weights, precision; use"):
        check_same(bundle.identity, other, "photos")


def test_calibration(bundle, scenes):
    rows, owners = bundles.calibration(bundle)
    known = {example.image_id for example in scenes.split("val").examples}
    assert rows.shape == (len(owners), 16) and len(owners) == 30 and set(owners) == known
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
