"""The figures of benchmarks/structure.py, on a small package made by hand."""

from benchmarks.structure import Module, measure

ROOM = '''"""A docstring is no code.

import nothing
"""

from crosstill import hall  # 1 import line


def enter(cache):
    """Test for a kind."""
    from crosstill.annexe import (  # lazily, 3 lines
        door,
    )
    if isinstance(cache, hall.TinyCache | None):  # a kind test
        return door(_once())


def _once():
    return 1
'''
HALL = """class TinyCache(Cache):
    pass


def leave():
    from crosstill import room
"""


def rows(files: dict[str, str]) -> dict[str, str]:
    return measure([Module(path, text) for path, text in files.items()]).rows


def test_lines_of_code_and_of_imports():
    table = rows({"room.py": ROOM})
    assert table["lines"] == "19"
    assert table["lines of code"] == "9"
    assert table["import lines"] == "4"
    assert table["import lines in lines of code"] == "44.4 %"
    assert table["private functions called once"] == "1"


def test_a_lazy_import_closes_a_cycle():
    table = rows({"room.py": ROOM, "hall.py": HALL})
    assert table["import cycles, at start"] == "0"
    assert table["import cycles, lazy ones too"] == "1"


def test_tests_for_kinds_count_outside_of_annexes():
    table = rows({"room.py": ROOM, "hall.py": HALL})
    assert table["kind tests in floor and distiller"] == "1"
    table = rows({"fusion/room.py": ROOM, "hall.py": HALL})
    assert table["kind tests in floor and distiller"] == "0"
    assert table["lines of floor and distiller"] == "6"


def test_files_of_one_name_but_for_those_that_every_package_may_have():
    paths = ("room.py", "cli/room.py", "a/base.py", "b/base.py", "a/__init__.py", "b/__init__.py")
    table = rows(dict.fromkeys(paths, "COUNT = 1\n"))
    assert table["source files"] == "6"
    assert table["file names that several files have"] == "1"


def test_imports_of_annexes_by_the_distiller():
    table = rows({"room.py": "from crosstill.search import door\n", "search/door.py": ""})
    assert table["imports of annexes by the distiller"] == "1"
