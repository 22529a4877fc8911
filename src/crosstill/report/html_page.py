"""A page as plain blocks, and its HTML. Every text is escaped: captions come from anywhere."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, ClassVar

import jinja2

from crosstill import files
from crosstill.report.pictures import Picture
from crosstill.report.run_results import Query


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Command:
    """The command that the user typed."""

    kind: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Sheet:
    """A table; numeric ones have their numbers at the right."""

    kind: ClassVar[str] = "table"
    heads: Sequence[str]
    body: Sequence[Sequence[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, as many as there is room for."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Queries:
    """Captions and the photos that the models find for them."""

    kind: ClassVar[str] = "queries"
    queries: Sequence[Query]


Block = Text | Command | Sheet | Pictures | Queries


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def html(title: str, summary: str, sections: Sequence[Section]) -> str:
    """Render the whole page."""
    source = resources("crosstill.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(title=title, summary=summary, sections=sections)


def save(folder: Path, page: str, texts: Mapping[str, str], figures: tuple[str, Any]) -> Path:
    """Write the page and what goes beside it; return where the page is.

    Args:
        folder: made if it is not there.
        page: the HTML.
        texts: file name → contents.
        figures: a file's name and its JSON.
    """
    files.writable_folder(folder)
    for name, text in {**texts, "report.html": page}.items():
        # a file name on disk need not be valid UTF-8
        files.write_bytes(folder / name, text.encode("utf-8", "replace"))
    files.write_json(folder / figures[0], figures[1])
    return folder / "report.html"


def settings(values: Mapping[str, Any]) -> Sheet:
    """List settings, one a line, with the dotted names that --set takes."""
    return Sheet(("setting", "value"), list(_flat(values, "")), numeric=False)


def _flat(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _written(value)


def _written(value: object) -> str:
    if value is None:
        return "none"
    if value == {}:
        return "defaults"
    return value if isinstance(value, str) else json.dumps(value)
