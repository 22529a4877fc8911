"""A BEiT-3 file from its `.pth` to a cache, by the verbs that a user types."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crosstill import cache, data, images, teachers
from crosstill.teachers.beit3 import SIZES, Beit3, Network
from teachers.beit3_files import small, write_pieces
from teachers.released_files import RETRIEVAL
from teachers.released_files import small as small_meter
from verbs import crosstill, refusal

DATA = "scenes:12"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A half-precision file as DeepSpeed left it, and a tokenizer of the scenes' captions."""
    home = tmp_path_factory.mktemp("home")
    halves = {name: value.half() for name, value in small().items()}
    torch.save({"model": halves, "epoch": 3}, home / "beit3_small.pth")
    write_pieces(home / "beit3.spm", captions())
    return home


def captions() -> list[str]:
    return [text for example in data.open(DATA).examples for text in example.captions]


def converting(home: Path, out: Path) -> list[object]:
    return ["--unpickle", "--out", out, "--tokenizer", home / "beit3.spm"]


def check_cache(home: Path, dim: int) -> None:
    """The cache holds what the converted teacher says of each image and caption."""
    told = cache.Cache(home / "cache")
    teacher = teachers.load(home / "model", torch.device("cpu"))
    pairs = data.open(DATA)
    assert isinstance(teacher, Beit3)
    assert (told.dim, len(told.image_ids)) == (dim, len(pairs.examples))
    assert told.header["key"]["teacher"] == teacher.identity()
    by_id = {example.image_id: example for example in pairs.examples}
    for row, key in enumerate(told.image_ids[:4]):
        pixels = images.load(pairs.read(by_id[key]), "", teacher.preprocess)
        stored = told.image_features(np.array([row]))
        torch.testing.assert_close(stored, teacher.embed_images(pixels[None]), atol=1e-3, rtol=0)
    stored = told.text_features(np.arange(8))
    torch.testing.assert_close(stored, teacher.embed_texts(told.texts[:8]), atol=1e-3, rtol=0)


def test_a_file_becomes_a_folder_and_the_folder_a_cache(home, tmp_path):
    told = crosstill("inspect", home / "beit3_small.pth", *converting(home, tmp_path / "model"))
    assert told.stdout.splitlines()[0].split() == ["family", "beit3"]
    assert "width 128, layers 2, heads 2, mlp 192, patch 8, image_size 32" in told.stdout
    assert "loads whole" in told.stdout and told.stderr == f"written to {tmp_path / 'model'}\n"
    crosstill("cache", tmp_path / "model", DATA, "--out", tmp_path / "cache")
    check_cache(tmp_path, 128)
    again = json.loads(crosstill("inspect", tmp_path / "model", "--json").stdout)
    model = teachers.load(tmp_path / "model", torch.device("cpu"))
    assert isinstance(model, Beit3) and model.name == "beit3_small"
    assert again["whole"] and again["parameters"] == model.network.parameters_by_part()
    assert "needs no conversion" in refusal(
        "inspect", tmp_path / "model", *converting(home, tmp_path / "more")
    )


def test_another_size(home, tmp_path):
    words = converting(home, tmp_path / "model")
    crosstill("inspect", home / "beit3_small.pth", *words, "--size", 48)
    model = teachers.load(tmp_path / "model", torch.device("cpu"))
    assert model.preprocess.size == (48, 48)
    line = refusal("inspect", home / "beit3_small.pth", *words, "--size", 50)
    assert "image_size = 50 is not a multiple of patches of 8" in line
    line = refusal("inspect", home / "beit3_small.pth", "--unpickle", "--size", 48)
    assert "--size is of what --out writes" in line


def test_the_file_itself_is_no_teacher_and_says_what_to_do(home, tmp_path):
    for verb, more in (("cache", ["--out", tmp_path / "out"]), ("evaluate", [])):
        line = refusal(verb, home / "beit3_small.pth", DATA, *more)
        assert f"crosstill inspect {home / 'beit3_small.pth'} --unpickle --out FOLDER" in line
    assert not (tmp_path / "out").exists()
    assert "a pickled file, which could run code" in refusal("inspect", home / "beit3_small.pth")


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_hostile_and_wrong_files_are_one_line(home, tmp_path):
    out, path = tmp_path / "out", tmp_path / "it.pth"
    words = ["inspect", path, *converting(home, out)]
    torch.save({"model": small(1), "x": Malicious(f"touch {tmp_path}/trace")}, path)
    assert "refused, because reading it would run posix.system" in refusal(*words)
    assert not (tmp_path / "trace").exists()

    path.write_bytes((home / "beit3_small.pth").read_bytes()[:-1000])
    assert "not a file of tensors that torch reads safely" in refusal(*words)

    state = small(1)
    torch.save({"model": {k: v for k, v in state.items() if k != "vision_head.weight"}}, path)
    assert "it.pth: no vision_head.weight, so it has no joint space" in refusal(*words)

    torch.save({"model": state}, path)
    assert "not a METER checkpoint" in refusal(*words, "--family", "meter")
    assert "--student is for METER files, and this is beit3" in refusal(*words, "--student")
    line = refusal("inspect", path, "--unpickle", "--out", out, "--tokenizer", path)
    assert "it.pth: not a SentencePiece model" in line
    torch.save(small_meter(RETRIEVAL, layers=1), path)
    assert "no tensor named beit3.*: not a BEiT-3 checkpoint" in refusal(
        *words, "--family", "beit3"
    )
    assert "beit3.spm: no tokenizer" in refusal(*words)  # METER's tokenizer is a folder
    assert not out.exists()


def test_a_key_of_another_shape_is_listed(home, tmp_path):
    path, out = tmp_path / "it.pth", tmp_path / "out"
    torch.save({"model": small(1) | {"vision_head.weight": torch.zeros(128, 3)}}, path)
    told = crosstill("inspect", path, *converting(home, out), code=1).stdout
    assert "vision_head.weight [128, 3], asked for [128, 128]" in told
    assert told.splitlines()[-1] == "does not load whole" and not out.exists()


def test_without_sentencepiece_the_extra_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    line = refusal("inspect", home / "beit3_small.pth", *converting(home, tmp_path / "model"))
    assert line.endswith("install it with: pip install 'crosstill[beit3]'")


@pytest.mark.slow
def test_a_base_size_file_caches_scenes(home, tmp_path):
    torch.manual_seed(0)
    state = Network(SIZES["base"]).state_dict()
    halves = {name: value.half() for name, value in state.items()}
    torch.save({"model": halves}, tmp_path / "beit3_base.pth")
    told = crosstill("inspect", tmp_path / "beit3_base.pth", *converting(home, tmp_path / "model"))
    assert "total 222,167,041" in told.stdout
    crosstill("cache", tmp_path / "model", DATA, "--out", tmp_path / "cache")
    check_cache(tmp_path, 768)
