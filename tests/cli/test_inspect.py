"""`crosstill inspect` as a user meets it."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import crosstill
from crosstill.cli.app import app
from crosstill.fusion import meter_released
from crosstill.fusion.meter import Meter
from teachers import fusion_models
from teachers.conftest import make_dual
from teachers.released_files import PRETRAIN, RETRIEVAL, STUDENT, small, write_tokenizer

TEXTS = ["a red cube", "a blue ball and a red cube"]


def inspect(*arguments: object, code: int = 0) -> Result:
    words = ["inspect", *map(str, arguments)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refusal(*arguments: object) -> str:
    lines = inspect(*arguments, code=2).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A retrieval file with DCD's student, as DCD's authors would save it, and a tokenizer."""
    home = tmp_path_factory.mktemp("home")
    state = small(RETRIEVAL, STUDENT, layers=1)
    torch.save({"state_dict": state, "epoch": 3}, home / "dcd.ckpt")
    save_file(state, home / "dcd.safetensors")
    write_tokenizer(home / "tokenizer")
    return home


@pytest.fixture(scope="module")
def pixels() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=random) for _ in TEXTS]


def test_a_whole_file(home):
    told = inspect(home / "dcd.safetensors").stdout
    assert told.splitlines()[0].split() == ["family", "meter"]
    assert "image_size 32, patch_size 8, layers 1, width 128, heads 2, mlp 192" in told
    assert "model_type roberta, num_hidden_layers 1, hidden_size 128" in told
    assert "162: DCD's student, read with --student" in told
    assert told.splitlines()[-1] == "loads whole"


def test_its_json_for_teacher_and_student(home):
    for student in (False, True):
        flags = ["--student"] if student else []
        found = json.loads(inspect(home / "dcd.safetensors", "--json", *flags).stdout)
        assert found["family"] == "meter" and found["whole"]
        assert found["missing"] == found["unexpected"] == found["misshapen"] == {}
        assert found["sizes"]["fusion"]["layers"] == (3 if student else 6)
        model = meter_released.examine(small(RETRIEVAL, STUDENT, layers=1), student)[0]
        assert found["parameters"] == model.parameters_by_part()


def test_a_pickled_file_is_read_only_with_leave(home):
    line = refusal(home / "dcd.ckpt")
    assert "dcd.ckpt: a pickled file" in line and "--unpickle" in line
    by_pickle = inspect(home / "dcd.ckpt", "--unpickle", "--family", "meter", "--json").stdout
    assert by_pickle == inspect(home / "dcd.safetensors", "--json").stdout


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_malicious_file_is_refused_and_nothing_ran(tmp_path):
    content = {"state_dict": small(PRETRAIN, layers=1), "x": Malicious(f"touch {tmp_path}/trace")}
    torch.save(content, tmp_path / "evil.ckpt")
    line = refusal(tmp_path / "evil.ckpt", "--unpickle")
    assert "evil.ckpt: refused, because reading it would run posix.system" in line
    assert not (tmp_path / "trace").exists()


def test_what_does_not_fit_is_listed(home, tmp_path):
    state = load_file(home / "dcd.safetensors")
    state["vqa_classifier.0.weight"] = torch.zeros(4, 256)
    state["cross_modal_image_layers.2.output.densely.bias"] = state.pop(
        "cross_modal_image_layers.2.output.dense.bias"
    )
    state["rank_output.bias"] = torch.zeros(2)
    save_file(state, tmp_path / "odd.safetensors")
    out = tmp_path / "out"
    converting = ["--out", out, "--tokenizer", home / "tokenizer"]
    told = inspect(tmp_path / "odd.safetensors", *converting, code=1).stdout
    lines = [line.strip() for line in told.splitlines()]
    assert "cross_modal_image_layers.2.output.dense.bias [128]" in lines
    assert "cross_modal_image_layers.2.output.densely.bias [128]" in lines
    assert "vqa_classifier.0.weight [4, 256]" in lines
    assert "rank_output.bias [2], asked for [1]" in lines
    assert lines[-1] == "does not load whole" and not out.exists()
    found = json.loads(inspect(tmp_path / "odd.safetensors", "--json", code=1).stdout)
    assert not found["whole"]
    assert found["missing"] == {"cross_modal_image_layers.2.output.dense.bias": [128]}
    assert len(found["unexpected"]) == 2
    assert found["misshapen"] == {"rank_output.bias": {"found": [2], "wanted": [1]}}


@pytest.mark.parametrize("student", [False, True])
def test_a_file_becomes_a_teachers_folder(home, pixels, tmp_path, student):
    flags = ["--student"] if student else []
    converting = ["--out", tmp_path / "out", "--tokenizer", home / "tokenizer"]
    told = inspect(home / "dcd.ckpt", "--unpickle", *flags, *converting)
    assert told.stderr == f"written to {tmp_path / 'out'}\n"
    model = crosstill.teachers.load(tmp_path / "out", torch.device("cpu"))
    assert isinstance(model, Meter) and model.depth == (3 if student else 6)
    state = load_file(home / "dcd.safetensors")
    expected = meter_released.load(state, home / "tokenizer", "it", student).score(pixels, TEXTS)
    assert torch.equal(model.score(pixels, TEXTS), expected)

    again = json.loads(inspect(tmp_path / "out", "--json").stdout)
    assert again["whole"] and again["parameters"] == model.parameters_by_part()
    assert "needs no conversion" in refusal(
        tmp_path / "out", "--out", tmp_path / "more", "--tokenizer", home / "tokenizer"
    )


@pytest.mark.parametrize("family", ["vilt", "blip", "bridgetower", "bridgetower-dual", "clip"])
def test_a_hugging_face_folder_as_transformers_reports_it(family, tmp_path):
    if family == "clip":
        make_dual(family, tmp_path)
    else:
        fusion_models.save(family, tmp_path)
    told = json.loads(inspect(tmp_path, "--json").stdout)
    assert told["whole"] and told["family"] == family.removesuffix("-dual")
    state = load_file(tmp_path / "model.safetensors")
    assert told["parameters"]["total"] > 0
    names = sorted(name for name in state if name.endswith("weight") and state[name].ndim == 2)
    gone, renamed, bent = names[0], names[1], names[2]
    shapes = {name: list(state[name].shape) for name in (gone, renamed, bent)}
    del state[gone]
    state["something.else"] = state.pop(renamed)
    state[bent] = torch.zeros(shapes[bent][0] + 1, shapes[bent][1])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = json.loads(inspect(tmp_path, "--json", code=1).stdout)
    assert told["missing"] == {name: shapes[name] for name in (gone, renamed)}
    assert told["unexpected"] == {"something.else": shapes[renamed]}
    assert told["misshapen"] == {
        bent: {"found": [shapes[bent][0] + 1, shapes[bent][1]], "wanted": shapes[bent]}
    }


def test_wrong_use_is_one_line(home, tmp_path):
    file = home / "dcd.safetensors"
    assert "--out and --tokenizer belong together" in refusal(file, "--out", tmp_path / "out")
    assert "no family named 'metre'; did you mean 'meter'?" in refusal(file, "--family", "metre")
    assert "no such folder" in refusal(tmp_path / "nothing.ckpt")
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    other = tmp_path / "other.safetensors"
    assert "1 tensors (layer.weight, ...) of no known family" in refusal(other)
    assert "not a METER checkpoint" in refusal(other, "--family", "meter")
    save_file(small(PRETRAIN, layers=1), tmp_path / "plain.safetensors")
    line = refusal(tmp_path / "plain.safetensors", "--student")
    assert "plain.safetensors: no tensor named stu_cross_modal_image_layers.*" in line
    line = refusal(file, "--out", tmp_path / "out", "--tokenizer", tmp_path)
    assert line.startswith("error: ") and "no tokenizer" in line
