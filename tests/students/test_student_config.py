from pathlib import Path

import pytest

from crosstill.errors import ConfigError
from crosstill.students import load_config
from crosstill.students.student_config import PRESETS

TOML = """
name = "mine"
max_length = 24
[image]
source = "towers/image"
[text]
pooling = "cls"
vocabulary = "trim"
config = { model_type = "bert" }
"""


def _refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_presets_parse_and_say_what_they_are() -> None:
    assert set(PRESETS) == {
        "paper",
        "cnn-bert",
        "deit-albert",
        "mobile",
        "mobile-hf",
        "tiny",
        "tiny-hf",
        "tiny-nested",
        "tiny-teacher",
        "half",
    }
    paper, mobile = load_config("paper"), load_config("mobile")
    assert (paper.image.pooling, paper.text.pooling, paper.bias) == ("cls", "pooler", True)
    assert (mobile.image.pooling, mobile.text.pooling, mobile.bias) == ("pooler", "mean", False)
    assert (mobile.text.layers, mobile.text.vocabulary) == (3, "trim")
    assert all(config.name == name for name, config in PRESETS.items())


def test_batch_norm_is_frozen_where_it_came_pretrained() -> None:
    mobile, tiny = PRESETS["mobile"], PRESETS["tiny"]
    assert mobile.freezes_batch_norm
    assert not tiny.freezes_batch_norm
    assert not mobile.model_copy(update={"batch_norm": "train"}).freezes_batch_norm
    assert tiny.model_copy(update={"batch_norm": "frozen"}).freezes_batch_norm


def test_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "student.toml"
    path.write_text(TOML)
    config = load_config(path)
    assert (config.name, config.max_length, config.dim) == ("mine", 24, None)
    assert (config.text.pooling, config.image.pooling) == ("cls", "pooler")
    assert config.image.source == "towers/image"


def test_sources_are_sought_here_first_and_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "towers" / "image").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    (there / "student.toml").write_text(TOML)
    beside = load_config(there / "student.toml").image.source
    assert beside == str(there / "towers" / "image")
    (here / "towers" / "image").mkdir(parents=True)
    assert load_config(there / "student.toml").image.source == "towers/image"


def test_unknown_keys_are_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = tmp_path / "student.toml"
    assert "did you mean 'max_length'" in _refused(path, TOML.replace("max_length", "max_lenght"))
    assert "'image.sorce'; did you mean 'image.source'" in _refused(
        path, TOML.replace("source", "sorce")
    )


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('pooling = "cls"', 'pooling = "max"', "text.pooling"),
        ("max_length = 24", "max_length = 1", "max_length"),
        ("max_length = 24", "max_length = [", "not readable TOML"),
        ('source = "towers/image"', "", "image: give either source or config"),
        ('model_type = "bert"', "vocab_size = 9", "model_type"),
        ("[image]", "[images]", "images"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert named in _refused(tmp_path / "student.toml", TOML.replace(old, new))


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mobile'"):
        load_config("mobil")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.toml")
