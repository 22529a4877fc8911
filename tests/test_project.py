"""What holds for the project as a whole."""

import ast
import doctest
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import crosstill

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/crosstill").rglob("*.py"))


def listed(text: str) -> list[str]:
    """The names that open the lines of the first indented list."""
    return re.findall(r"^    (\w+) {2,}\S", text, re.MULTILINE)


def test_docstring_and_import_contract_are_one_list():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.partition(".")[2] for layer in contracts["contracts"][0]["layers"]]
    assert listed(crosstill.__doc__) == layers[::-1]


def test_the_contracts_hold_the_groups_of_the_list():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    _, annexes, torchless = contracts["contracts"]
    heads = re.split(r"^(?=\S.*:$)", crosstill.__doc__, flags=re.MULTILINE)
    floor, distiller, doors, _ = (listed(head) for head in heads if listed(head))
    assert set(annexes["source_modules"]) == {f"crosstill.{part}" for part in floor + distiller}
    assert set(annexes["forbidden_modules"]) == {f"crosstill.{part}" for part in doors}
    assert set(torchless["source_modules"]) == {f"crosstill.{part}" for part in [*floor, "search"]}
    assert {"torch", "transformers", "pyarrow"} <= set(torchless["forbidden_modules"])


def test_every_part_is_on_the_list():
    parts = {p.stem for p in (ROOT / "src/crosstill").iterdir() if p.suffix in ("", ".py")}
    assert parts - {"__init__", "__main__", "__pycache__", "py"} == set(listed(crosstill.__doc__))


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert crosstill.__version__ == project["version"]


def test_torchvision_is_not_pulled_in():
    """A half-installed torchvision breaks transformers; nothing here needs it."""
    assert importlib.util.find_spec("torchvision") is None


def test_our_warnings_are_log_lines_that_the_command_line_shows():
    """It silences Python's warnings, which are other libraries' notes to developers."""
    assert not [path for path in SOURCES if "warnings.warn(" in path.read_text()]


def test_no_module_imports_the_root_for_a_name():
    """A part that imports `crosstill` itself would import what stands above it."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "crosstill" not in names, path
            if isinstance(node, ast.ImportFrom) and node.module == "crosstill":
                parts = {alias.name for alias in node.names}
                assert parts.isdisjoint({"__version__", "distill", "open_model"}), path


def test_nothing_is_pickled():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None)]
                assert not {"pickle", "cPickle", "dill", "joblib"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                loads = (node.value.id, node.attr) == ("torch", "load")
                # the one place where a user may ask for a pickled checkpoint, read restricted
                assert not loads or path == ROOT / "src/crosstill/teachers/checkpoints.py", path


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if ">>> " in path.read_text()], ids=lambda path: path.stem
)
def test_examples_in_docstrings_are_true(path):
    name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
