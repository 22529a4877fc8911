"""What `evaluate` puts side by side."""

import json

import pytest

from crosstill import data, students
from support import small_config
from verbs import crosstill


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A student with embeddings of 4, 8 and 16 numbers."""
    folder = tmp_path_factory.mktemp("nested") / "student"
    texts = [text for example in data.open("scenes:60").examples for text in example.captions]
    config = small_config().model_copy(update={"widths": (4, 8)})
    students.build(config, dim=16, captions=texts).save(folder)
    return folder


def test_a_student_with_several_widths_has_a_row_for_each(nested):
    found = crosstill("evaluate", nested, "scenes:60")
    rows = [line.split("|")[1].strip() for line in found.stdout.splitlines()[2:]]
    assert rows == [str(nested), f"{nested}@8", f"{nested}@4"]


def test_each_width_is_what_it_is_alone(nested):
    found = json.loads(crosstill("evaluate", nested, "scenes:60", "--json").stdout)
    assert [row["model"] for row in found["beside"]] == [f"{nested}@8", f"{nested}@4"]
    alone = json.loads(crosstill("evaluate", f"{nested}@4", "scenes:60", "--json").stdout)
    assert alone["rsum"] == pytest.approx(found["beside"][1]["rsum"])
    assert alone["parameters"] < found["parameters"]
