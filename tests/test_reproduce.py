"""docs/reproduce.md cannot rot: every command on it is read by the command line's own parser."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from crosstill import recipes
from crosstill.ablate.tables import TABLES
from crosstill.cli.app import app
from crosstill.evaluate.recall import PROTOCOLS
from crosstill.students.student_config import PRESETS

PAGE = (Path(__file__).parent.parent / "docs/reproduce.md").read_text()
VERBS = typer.main.get_command(app).commands


def commands(text: str) -> list[list[str]]:
    """The indented commands of a page, without `crosstill`."""
    lines = re.findall(r"^    crosstill ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " "), comments=True) for line in lines]


COMMANDS = commands(PAGE)


def parsed(words: list[str]) -> tuple[str, dict]:
    verb, *rest = words
    with VERBS[verb].make_context(verb, rest) as context:
        return verb, context.params


def test_the_page_has_the_whole_way():
    assert {words[0] for words in COMMANDS} == {
        *("doctor", "inspect", "evaluate", "cache", "train", "ablate", "report"),
    }
    assert len(COMMANDS) > 25
    listed = {words[1] for words in COMMANDS if words[0] == "ablate"}
    assert listed == {*TABLES, "table3"}, "every table that we can make is on the page"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_every_command_is_one_that_the_program_takes(words):
    verb, options = parsed(words)
    if verb == "train":
        recipes.config(options["recipe"], options["changes"] or [])
        assert options["student"] in PRESETS
    if verb == "evaluate":
        assert options["protocol"] in PROTOCOLS
    if verb == "ablate":
        assert set(options["student"] or ()) <= set(PRESETS)


def test_the_check_can_fail():
    with pytest.raises(Exception, match="No such option"):
        parsed(["train", "CACHE", "--out", "o", "--recipee", "dsmd"])
    with pytest.raises(Exception, match="Missing"):
        parsed(["train", "--out", "o"])


def test_what_one_command_makes_the_next_one_finds():
    """Every folder under models/, caches/, runs/ and grids/ is written before it is read."""
    made: set[str] = set()
    for words in COMMANDS:
        out = words[words.index("--out") + 1] if "--out" in words else ""
        read = [word for word in words if re.match(r"(models|caches|runs|grids)/", word)]
        assert set(read) - {out} <= made, words
        made.add(out)


def test_the_files_are_named_where_they_come_from():
    table = PAGE.split("## 2.")[0]
    for words in COMMANDS:
        for word in words:
            if re.match(r"(files|flickr30k|coco)/", word) and not word.endswith("/images"):
                assert word.rsplit("/", 1)[-1] in table, word
