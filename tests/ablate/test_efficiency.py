"""`crosstill ablate table3`: what teacher and student cost, without training."""

import json

import numpy as np
import pytest

from ablate.scored import score_cache
from crosstill import data, students
from verbs import crosstill, refusal

SCENES = "scenes:20"


@pytest.fixture(scope="module")
def home(tmp_path_factory, student_folder):
    """A cache whose teacher is on disk."""
    place = tmp_path_factory.mktemp("costs")
    crosstill("cache", student_folder, SCENES, "--out", place / "cache")
    return place


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, cached):
    from support import small_student

    folder = tmp_path_factory.mktemp("teacher") / "small"
    small_student(cached).save(folder)
    return folder


def test_the_table_counts_and_times_teacher_and_students(home, student_folder, toml):
    typed = ["ablate", "table3", home / "cache", "--student", toml, "--student", "tiny"]
    told = crosstill(*typed, "--out", home / "grid").stdout
    lines = [line for line in told.splitlines() if line.startswith("|")]
    assert lines[0].startswith("|  | parameters | of the teacher's | ms/image | ms/caption |")
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["teacher (small)", f"student ({toml})", "student (tiny)"]
    written = json.loads((home / "grid/table3.json").read_text())
    sizes = [row["parameters"] for row in written["rows"]]
    whole = students.load(student_folder).parameter_count()
    assert sizes[0] == whole and sizes[2] > 10 * sizes[1]
    assert f"| {sizes[2]:,} | {sizes[2] / whole:.1%} |" in lines[4]
    assert "1,900 M, 16.5 ms" in lines[2] and "197 M, 2.1 ms" in lines[3]
    for row in written["rows"]:
        assert 0 < row["efficiency"]["image_ms"] < 1000
    first, last = (row["efficiency"] for row in (written["rows"][0], written["rows"][2]))
    ratio = sum(first[k] for k in ("image_ms", "caption_ms"))
    ratio /= sum(last[k] for k in ("image_ms", "caption_ms"))
    assert float(lines[4].split("|")[6].replace(",", "")) == pytest.approx(ratio, rel=0.01)
    assert told.strip() == (home / "grid/table3.md").read_text().strip()
    assert r"\begin{tabular}" in (home / "grid/table3.tex").read_text()


def test_the_report_of_a_grid_has_it(home, toml, tmp_path):
    grid = tmp_path / "grid"
    told = crosstill("ablate", "table3", home / "cache", "--student", toml, "--out", grid).stdout
    crosstill("report", grid, "--out", tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "What teacher and student cost" in page and f"student ({toml})" in page
    assert "1 table from 0 runs" in page
    assert (tmp_path / "out/table.md").read_text().strip() == told.strip()
    assert r"\begin{tabular}" in (tmp_path / "out/table.tex").read_text()
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    assert figures["costs"] == json.loads((grid / "table3.json").read_text())
    (grid / "table3.json").write_text('{"rows": 3}')
    told = crosstill("report", grid, code=1).stderr
    assert "table3.json: damaged; run `crosstill ablate table3` again" in told


def test_a_teacher_that_cannot_be_timed_is_said(home, toml, tmp_path):
    folder, examples = tmp_path / "vectors", data.open(SCENES).examples
    folder.mkdir()
    (folder / "filenames.txt").write_text("".join(f"{e.path}\n" for e in examples))
    np.save(folder / "images.npy", np.random.default_rng(0).standard_normal((len(examples), 8)))
    crosstill("cache", folder, SCENES, "--out", tmp_path / "cache")
    typed = ["ablate", "table3", tmp_path / "cache", "--student", toml]
    told = crosstill(*typed, "--out", tmp_path / "grid").stdout
    assert "| teacher (vectors) | – | – | – | – | – |" in told
    assert "The teacher was not timed: " in told and "vectors without a model" in told


@pytest.mark.parametrize(
    "option", [["--seeds", 3], ["--epochs", 1], ["--freeze", "image"], ["--workers", 1]]
)
def test_options_of_training_are_refused(home, toml, tmp_path, option):
    typed = ["ablate", "table3", home / "cache", "--student", toml, "--out", tmp_path / "grid"]
    assert f"{option[0]}: table3 trains nothing; leave it out" in refusal(*typed, *option)


def test_what_has_no_cost_to_compare_is_refused(home, toml, tmp_path):
    out = ["--out", tmp_path / "grid"]
    crosstill("cache", "none", SCENES, "--out", tmp_path / "none")
    for cache in (tmp_path / "none", score_cache(tmp_path, 12).folder):
        line = refusal("ablate", "table3", cache, "--student", toml, *out)
        assert "holds no features of a dual encoder" in line
    twice = ["--student", toml, "--student", toml]
    assert "compares different students" in refusal(
        "ablate", "table3", home / "cache", *twice, *out
    )
    assert not (tmp_path / "grid").exists()
