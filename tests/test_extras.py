import sys

import pytest

from crosstill import extras
from crosstill.errors import ConfigError
from verbs import refusal


def test_what_is_there_is_loaded():
    extras.need("this", "search", "json", "math")
    assert extras.load("this", "search", "math") is sys.modules["math"]


def test_all_that_is_missing_is_named_with_the_command_to_install_it():
    with pytest.raises(ConfigError) as refused:
        extras.need("a report", "report", "json", "not_there_1", "not_there_2")
    assert str(refused.value) == (
        "a report needs not_there_1 and not_there_2; "
        "install them with: pip install 'crosstill[report]'"
    )
    with pytest.raises(ConfigError, match=r"needs not_there; install it with: pip install 'cr"):
        extras.load("a report", "report", "not_there")


@pytest.mark.parametrize(
    ("module", "extra"), [("onnxscript", "export"), ("onnxruntime", "export"), ("faiss", "search")]
)
def test_the_demo_asks_before_it_trains(tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    line = refusal("demo", "--out", tmp_path / "demo")
    assert line.endswith(f"needs {module}; install it with: pip install 'crosstill[{extra}]'")
    assert not (tmp_path / "demo").exists()


def test_an_export_asks_before_it_reads(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    form = ["--to", "sentence-transformers", "--out", tmp_path / "out"]
    assert "needs sentence_transformers" in refusal("export", tmp_path, *form)
