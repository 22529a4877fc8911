"""Measure the structure of the source with `ast` and `tokenize`: imports, cycles, kinds, names.

    python -m benchmarks.structure                    the working tree
    python -m benchmarks.structure 68b7d38 HEAD       commits, a column each

A *line of code* holds a token that is neither a comment nor part of a docstring. Every line of an
import statement counts as an import, wherever it stands. A *kind test* is an `isinstance`,
`issubclass` or `case` that names a class of caches or models, or the name of a group of them.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SOURCE = "src/crosstill"
ANNEXES = {"fusion", "search", "scale", "ablate", "report", "doctor", "demo"}
SHARED_NAMES = {"__init__.py", "__main__.py", "base.py"}  # may occur in every package
# The classes, of any commit, from which those of caches and models inherit; and names of groups
KINDS = {"Listing", "CacheBase", "Cache", "FeatureCache", "ScoreCache", "Teacher", "TwoTowers"}
KINDS |= {
    "BundleModel",
    "FeaturesTeacher",
    "VectorsTeacher",
    "FusionTeacher",
    "Matcher",
    "Student",
    "Bundle",
}
KINDS |= {"FusionStudent", "Encoder", "Model", "AnyCache", "AnyModel"}
NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}

Graph = Mapping[str, set[str]]


class Import(NamedTuple):
    """One import of another module of the package."""

    module: str
    when: str  # "start", "lazy" (in a function) or "typing" (under TYPE_CHECKING)


@dataclass
class Module:
    """One parsed source file."""

    path: str  # relative to the package
    text: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)

    @property
    def name(self) -> str:
        """The dotted name, "crosstill" for the package itself."""
        parts = Path(self.path).with_suffix("").parts
        return ".".join(("crosstill", *(part for part in parts if part != "__init__")))

    @property
    def annex(self) -> bool:
        """Whether it belongs to an annex: neither to the floor nor to the distiller."""
        return Path(self.path).parts[0].removesuffix(".py") in ANNEXES

    @property
    def lines(self) -> int:
        """The number of its lines, blank ones and comments too."""
        return self.text.count("\n")

    def code_lines(self) -> set[int]:
        """Return the numbers of the lines of code."""
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
                docstrings |= lines_of(node.body[0])
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        code: set[int] = set()
        for token in tokens:
            if token.type not in NOT_CODE:
                code |= set(range(token.start[0], token.end[0] + 1))
        return code - docstrings

    def import_lines(self) -> set[int]:
        """Return the numbers of the lines of import statements."""
        imports = (n for n in ast.walk(self.tree) if isinstance(n, ast.Import | ast.ImportFrom))
        return {line for node in imports for line in lines_of(node)}

    def imports(self, known: set[str]) -> Iterator[Import]:
        """Yield the imports of modules in `known`; a package's part counts, not the package."""
        for node, when in dated(self.tree, "start"):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [part if part in known else node.module for part in parts]
            elif isinstance(node, ast.Call) and called(node) == "import_module":
                texts = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
                names = [text for text in texts if isinstance(text, str)]
            yield from (Import(name, when) for name in names if name in known)

    def kind_tests(self, kinds: set[str]) -> list[int]:
        """Return the lines on which a class of `kinds` is tested for."""
        lines = []
        for node in ast.walk(self.tree):
            tested: ast.AST | None = None
            if isinstance(node, ast.Call) and called(node) in ("isinstance", "issubclass"):
                tested = node.args[1]
            elif isinstance(node, ast.MatchClass):
                tested = node.cls
            if tested is not None and kinds & set(names_in(tested)):
                lines.append(node.lineno)
        return lines

    def called_once(self) -> int:
        """Count the private functions whose name occurs once outside of their definition."""
        functions = ast.FunctionDef | ast.AsyncFunctionDef
        defined = [n.name for n in ast.walk(self.tree) if isinstance(n, functions)]
        used = Counter(names_in(self.tree))
        return sum(name[0] == "_" != name[1:2] and used[name] == 1 for name in defined)


def lines_of(node: ast.stmt) -> set[int]:
    """Return the numbers of the lines of a statement."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def called(call: ast.Call) -> str:
    """Return the last name of what is called."""
    return next(iter([*names_in(call.func)][:1]), "")


def names_in(node: ast.AST) -> Iterator[str]:
    """Yield the names and attributes in an expression, an attribute before what it belongs to."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name):
            yield part.id


def dated(tree: ast.AST, when: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield every node with the time at which it runs."""
    for node in ast.iter_child_nodes(tree):
        inner = when
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "lazy"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in names_in(node.test):
            inner = "typing"
        yield node, inner
        yield from dated(node, inner)


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of modules that reach each other."""
    reached = {name: reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted({name} | {other for other in names if name in reached.get(other, ())}))
        for name, names in reached.items()
        if name in names
    }
    return sorted(map(list, groups))


def reachable(graph: Graph, start: str) -> set[str]:
    """Return the modules that one imports, directly or through others."""
    names: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - names
        names |= new
        waiting += new
    return names


def kinds(modules: Iterable[Module]) -> set[str]:
    """Return `KINDS` and every class that inherits from one of them."""
    classes = [n for m in modules for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef)]
    known = set(KINDS)
    while (
        new := {c.name for c in classes if known & {n for b in c.bases for n in names_in(b)}}
        - known
    ):
        known |= new
    return known


def read_tree() -> list[Module]:
    """Parse the source of the working tree."""
    folder = ROOT / SOURCE
    paths = sorted(folder.rglob("*.py"))
    return [Module(path.relative_to(folder).as_posix(), path.read_text()) for path in paths]


def read_commit(commit: str) -> list[Module]:
    """Parse the source of a commit."""
    command = ["git", "archive", "--format=tar", commit, SOURCE]
    packed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        files = [info for info in archive if info.name.endswith(".py")]
        return [
            Module(Path(info.name).relative_to(SOURCE).as_posix(), file.read().decode())
            for info in sorted(files, key=lambda info: info.name)
            if (file := archive.extractfile(info)) is not None
        ]


class Measures(NamedTuple):
    """The table's rows of one state of the source, and what lies behind the small ones."""

    rows: dict[str, str]
    details: list[str]


def measure(modules: list[Module]) -> Measures:
    """Measure one state of the source."""
    known = {module.name for module in modules}
    code = sum(len(module.code_lines()) for module in modules)
    imports = sum(len(module.import_lines()) for module in modules)
    inner = [module for module in modules if not module.annex]
    circles = {}
    for label, times in (("at start", {"start"}), ("lazy ones too", {"start", "lazy"})):
        graph = {m.name: {i.module for i in m.imports(known) if i.when in times} for m in modules}
        circles[label] = cycles(graph)
    tested = [(m.path, m.kind_tests(kinds(modules))) for m in inner]
    names = defaultdict(list)
    for module in modules:
        names[Path(module.path).name].append(module.path)
    repeated = [paths for name, paths in names.items() if len(paths) > 1]
    repeated = [paths for paths in repeated if Path(paths[0]).name not in SHARED_NAMES]
    outward = [
        f"{m.path} -> {i.module}"
        for m in inner
        for i in m.imports(known)
        if i.module.split(".")[1:2] and i.module.split(".")[1] in ANNEXES
        if not m.path.startswith("cli/") and m.name != "crosstill"
    ]
    rows = {
        "source files": f"{len(modules)}",
        "lines": f"{sum(m.lines for m in modules):,}",
        "lines of floor and distiller": f"{sum(m.lines for m in inner):,}",
        "lines of code": f"{code:,}",
        "import lines": f"{imports:,}",
        "import lines in lines of code": f"{imports / code:.1%}".replace("%", " %"),
        "private functions called once": f"{sum(m.called_once() for m in modules):,}",
        **{f"import cycles, {label}": f"{len(groups)}" for label, groups in circles.items()},
        "kind tests in floor and distiller": f"{sum(len(places) for _, places in tested)}",
        "imports of annexes by the distiller": f"{len(outward)}",
        "file names that several files have": f"{len(repeated)}",
    }
    details = [f"cycle: {' '.join(group)}" for group in circles["lazy ones too"]]
    details += [f"kind test: {path}:{line}" for path, places in tested for line in sorted(places)]
    details += [f"of an annex: {text}" for text in outward]
    details += [f"one name: {' '.join(paths)}" for paths in repeated]
    return Measures(rows, details)


def main() -> None:
    """Print the table, and with --details what lies behind the last column."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commits", nargs="*", help="commits; none: the working tree")
    parser.add_argument("--details", action="store_true", help="name cycles, kind tests, files")
    options = parser.parse_args()
    columns = {commit: measure(read_commit(commit)) for commit in options.commits}
    columns = columns or {"working tree": measure(read_tree())}
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for label in next(iter(columns.values())).rows:
        print(f"| {label} | " + " | ".join(m.rows[label] for m in columns.values()) + " |")
    if options.details:
        print("\n" + "\n".join([*columns.values()][-1].details))


if __name__ == "__main__":
    main()
