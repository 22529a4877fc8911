"""The public names: those listed here, importable from one level, and all that README and docs use.

A name that is added, renamed or taken away is a change for users: it goes into this list and into
the changelog.
"""

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

import crosstill

ROOT = Path(__file__).parent.parent
EXPORTED = {
    "": "ablate balance bundle cache data distill evaluate export fusion objectives open_model "
    "recipes report search students teachers train",
    "ablate": "TABLES Table fill is_grid latex markdown read run",
    "balance": "BALANCERS Balancer build known",
    "cache": "Cache CacheBase PixelStore Split build build_features is_cache join memo open pixels",
    "data": "FORMATS SOURCES SPLITS Entry FileSet Folder Listing Pairs open reader",
    "evaluate": "CachedSplit Embedded Evaluation Options TokenRows embed evaluating frozen_images "
    "frozen_texts measure open_model pool_images pool_texts retrieval settled_images "
    "settled_texts table teacher_recall",
    "export": "FORMS MAX_LOSS Exported Form Options onnx run sentence_transformers transformers",
    "fusion": "Matcher Reranked ScoreCache Scored build build_scores rerank score_matrix",
    "objectives": "LOSSES Input ListInput Objective build known",
    "recipes": "RECIPES choose config distill resumed",
    "report": "write",
    "search": "MAX_TOP Built Hit Photo Searcher Verdict build combine verify",
    "students": "build load load_config shorten",
    "teachers": "FAMILIES load",
    "train": "Learner Run TrainConfig train",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("package", EXPORTED)
def test_the_list_is_complete_and_importable(package):
    module = importlib.import_module(f"crosstill.{package}".rstrip("."))
    assert sorted(module.__all__) == sorted(EXPORTED[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_names_complete_in_a_notebook():
    assert sorted(dir(crosstill)) == sorted([*EXPORTED[""].split(), "__version__"])


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'crosstill' has no attribute 'distil'"):
        crosstill.distil  # noqa: B018


@pytest.mark.parametrize("block", BLOCKS)
def test_what_the_pages_import_and_call_is_there(block):
    """Names resolve from `ct` and from imports, and calls use keywords that the functions have."""
    tree = ast.parse(block)
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "crosstill":
                    known[alias.asname or alias.name] = crosstill
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crosstill"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                place = f"{node.module}.{alias.name}"
                found = getattr(module, alias.name, None) or importlib.import_module(place)
                known[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := resolved(node.func, known)) is not None:
            parameters = inspect.signature(function).parameters
            free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
            for keyword in node.keywords:
                assert free or keyword.arg in parameters, ast.unparse(node)


@pytest.mark.parametrize("package", EXPORTED)
def test_no_option_of_the_api_is_untyped(package):
    """Options by keyword are named one by one or by an `Unpack[...]`, never `**options: Any`."""
    module = importlib.import_module(f"crosstill.{package}".rstrip("."))
    for name, function in functions(module):
        for parameter in inspect.signature(function).parameters.values():
            place = f"{module.__name__}.{name}({parameter})"
            assert parameter.annotation is not inspect.Parameter.empty, place
            if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                assert parameter.annotation not in (typing.Any, "Any"), place


def functions(module: ModuleType) -> Iterator[tuple[str, Callable[..., object]]]:
    """The public functions of a module, and the public methods of its public classes."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and value.__module__.startswith("crosstill"):
            for attribute in vars(value):
                public = not attribute.startswith("_") or attribute == "__init__"
                # bound to the class, a method of it has no `cls`; a protocol makes no instances
                method = getattr(value, attribute)
                if public and inspect.ismethod(method):
                    yield f"{name}.{attribute}", method
                elif (
                    public
                    and inspect.isfunction(method)
                    and not getattr(value, "_is_protocol", False)
                ):
                    yield f"{name}.{attribute}", partial(method, None)


def resolved(node: ast.expr, known: dict[str, object]) -> object | None:
    """The object of a dotted name that begins with an import; None of any other expression."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, known)
        return None if owner is None else getattr(owner, node.attr)
    return None
