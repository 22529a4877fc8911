"""`crosstill evaluate` with fusion models: matrix, re-ranking, cost, and what it refuses."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosstill import data, files, students
from crosstill.data import scenes
from evaluate.judges import small_meter, texts_of
from support import small_config
from verbs import crosstill, refusal

IMAGES, CAPTIONS = 6, 30


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Photos, two fusion models, a dual encoder, vectors, and runs with a fusion teacher."""
    home = tmp_path_factory.mktemp("home")
    scenes.write(home / "photos", 60)
    texts = texts_of(data.open(home / "photos/dataset.json"))
    small_meter(home / "meter", texts)
    small_meter(home / "half", texts, layers=1)
    students.build(small_config(), dim=16, captions=texts).save(home / "dual")
    (home / "vectors").mkdir()
    (home / "vectors/filenames.txt").write_text("000009.png\n")
    np.save(home / "vectors/image.npy", np.ones((1, 4), np.float32))
    run_of(home / "fused", home / "half", home)
    run_of(home / "distilled", home / "dual", home)
    return home


def run_of(folder: Path, student: Path, home: Path) -> None:
    """The parts of a finished run that evaluation reads."""
    teacher = {"kind": "fusion", "name": "meter", "source": str(home / "meter")}
    folder.mkdir()
    record = {
        "format": 2,
        "teacher": teacher,
        "settings": {},
        "command": "",
        "versions": {},
        "cache": {"folder": "gone", "digest": ""},
        "data": {"name": "photos"},
    }
    files.write_json(folder / "config.json", files.sealed(record))
    for place in ("student", "best"):
        shutil.copytree(student, folder / place)


@pytest.fixture(scope="module")
def photos(home) -> Path:
    return home / "photos/dataset.json"


def test_the_full_matrix(home, photos, caplog):
    caplog.set_level(logging.INFO, logger="crosstill")
    found = crosstill("evaluate", home / "meter", photos)
    assert f"{IMAGES} images x {CAPTIONS} captions are 180 passes" in caplog.text
    head, _, row = cells(found.stdout)
    assert head[-1] == "RSUM" and row[0] == str(home / "meter") and float(row[-1]) > 0
    values = json.loads(crosstill("evaluate", home / "meter", photos, "--json").stdout)
    assert (values["images"], values["captions"]) == (IMAGES, CAPTIONS)
    assert values["rsum"] == pytest.approx(float(row[-1]), abs=0.01)


def test_a_fusion_model_beside_others(home, photos):
    options = ("--beside", home / "half", "--beside", home / "dual")
    table = cells(crosstill("evaluate", home / "meter", photos, *options).stdout)
    assert [row[0] for row in table[2:]] == [str(home / name) for name in ("meter", "half", "dual")]
    values = json.loads(crosstill("evaluate", home / "dual", photos, *options, "--json").stdout)
    assert [row["model"] for row in values["beside"]] == [str(home / "half"), str(home / "dual")]
    assert values["beside"][1]["rsum"] == values["rsum"]
    assert values["beside"][0]["rsum"] != values["rsum"]


def test_costs_of_what_was_run(home, photos):
    options = ("--efficiency", "--beside", home / "dual")
    head, _, *rows = cells(crosstill("evaluate", home / "meter", photos, *options).stdout)
    assert head[-5:] == ["ms/image", "ms/caption", "passes", "seconds", "times faster"]
    meter, dual = rows
    assert meter[-5:-2] == ["–", "–", "180"] and dual[-3] == "36"
    assert float(dual[-5]) > 0 and float(meter[-2]) > 0 and float(dual[-2]) > 0
    assert meter[-2][0] != "≈" and "1" in (meter[-1], dual[-1])
    found = crosstill("evaluate", home / "meter", photos, *options, "--json")
    values = json.loads(found.stdout)
    assert values["cost"]["passes"] == 180 and values["cost"]["estimated"] is False
    assert values["beside"][0]["cost"]["passes"] == 36
    assert values["rsum"] > 0 and "≈" not in found.stderr


def test_costs_from_a_sample(home, photos):
    options = ("--efficiency", "--sample", 50, "--beside", home / "meter")
    found = crosstill("evaluate", home / "dual", photos, *options)
    _, _, dual, meter = cells(found.stdout)
    assert meter[2:9] == ["–"] * 7 and float(dual[8]) > 0
    assert meter[-2].startswith("≈") and not dual[-2].startswith("≈")
    assert f"≈ {home / 'meter'}: seconds extrapolated from 50 timed pairs of 180" in found.stderr
    values = json.loads(crosstill("evaluate", home / "dual", photos, *options, "--json").stdout)
    cost = values["beside"][0]["cost"]
    assert (cost["passes"], cost["sample"], cost["estimated"]) == (180, 50, True)
    assert "rsum" not in values["beside"][0] and values["cost"]["estimated"] is False


def test_re_ranking(home, photos, caplog):
    caplog.set_level(logging.INFO, logger="crosstill")
    options = ("--finder", home / "dual", "--top", 7)
    found = crosstill("evaluate", home / "meter", photos, *options)
    table = cells(found.stdout)
    assert [row[0] for row in table[2:]] == ["0", "1", "5", "7"]
    assert table[2][1:8] == table[3][1:8]  # one candidate changes no R@1, nor six images' R@5
    assert "passes of 180" in caplog.text
    values = json.loads(crosstill("evaluate", home / "meter", photos, *options, "--json").stdout)
    assert values["finder"]["model"] == str(home / "dual")
    assert values["judge"] == str(home / "meter")
    direct = json.loads(crosstill("evaluate", home / "dual", photos, "--json").stdout)
    assert values["finder"]["rsum"] == direct["rsum"]


def test_re_ranking_everything_is_the_full_matrix(home, photos):
    found = crosstill(
        "evaluate", home / "meter", photos, "--finder", home / "dual", "--top", CAPTIONS, "--json"
    )
    last = json.loads(found.stdout)["stages"][-1]
    full = json.loads(crosstill("evaluate", home / "meter", photos, "--json").stdout)
    assert last["i2t"] == full["i2t"] and last["t2i"] == full["t2i"]


def test_the_top_is_twenty_when_nothing_is_said(home, photos):
    options = ("--finder", home / "dual", "--efficiency", "--json")
    values = json.loads(crosstill("evaluate", home / "meter", photos, *options).stdout)
    assert [stage["k"] for stage in values["stages"]] == [1, 5, 10, 20]
    assert values["threads"] == 1


def test_a_run_with_a_fusion_teacher(home, photos):
    found = crosstill("evaluate", home / "distilled", photos, "--efficiency")
    assert [row[0] for row in cells(found.stdout)[2:]] == [
        "student (distilled)",
        "student, untrained",
    ]
    notes = [line for line in found.stderr.splitlines() if "no teacher's row" in line]
    assert len(notes) == 1 and f"--beside {home / 'meter'}" in notes[0]


def test_a_run_that_trained_a_fusion_model(home, photos):
    found = crosstill("evaluate", home / "fused", photos)
    assert [row[0] for row in cells(found.stdout)[2:]] == ["student (fused)"]
    assert f"--beside {home / 'fused/student'}" in found.stderr
    assert f"--beside {home / 'meter'}" in found.stderr
    options = ("--beside", home / "half", "--json")
    values = json.loads(crosstill("evaluate", home / "fused", photos, *options).stdout)
    assert values["beside"][0]["rsum"] == values["rsum"]


def test_unreadable_photos_are_named(home, tmp_path):
    scenes.write(tmp_path, 30)
    (tmp_path / "000009.png").write_bytes(b"rubbish")
    found = crosstill("evaluate", home / "meter", tmp_path / "dataset.json", "--json")
    assert json.loads(found.stdout)["images"] == 2
    assert "000009.png: not an image" in found.stderr
    strict = ("--strict", "--beside", home / "dual")
    assert "000009.png" in refusal("evaluate", home / "meter", tmp_path / "dataset.json", *strict)


def test_what_is_refused(home, photos):
    meter, dual = home / "meter", home / "dual"
    cases = [
        ((meter, "--finder", home / "half"), "half: a fusion model, which reads pairs"),
        ((dual, "--finder", dual), "dual: a dual encoder, which does not read pairs"),
        ((meter, "--finder", dual, "--top", 0), "--top 0"),
        ((meter, "--finder", dual, "--top", -3), "--top -3"),
        ((meter, "--top", 5), "--top 5: re-ranks what a dual encoder finds; give --finder"),
        ((meter, "--sample", 10), "--sample 10: the pairs that are timed; add --efficiency"),
        ((meter, "--sample", 0, "--efficiency"), "--sample 0"),
        ((dual, "--sample", 10, "--efficiency"), "fusion models, and none is here"),
        ((home / "vectors",), "vectors without a model"),
        ((meter, "--beside", home / "vectors"), "vectors without a model"),
        ((meter, "--finder", home / "vectors"), "vectors without a model"),
        ((meter, "--finder", dual, "--beside", dual), "leave them out"),
        ((meter, "--finder", dual, "--sample", 9), "leave them out"),
        ((meter, "--protocol", "coco-1k-5fold"), "is for embeddings"),
        ((meter, "--protocol", "fulll"), "did you mean 'full'"),
        ((meter, "--beside", home / "nowhere"), "nowhere: no such folder"),
    ]
    for (model, *options), message in cases:
        assert message in refusal("evaluate", model, photos, *options), (model, options)
