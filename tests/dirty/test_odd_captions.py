"""Any caption goes from a listing to a trained student and its recall; what is left out is said."""

import json
import re
from pathlib import Path

import pytest

from crosstill import data, evaluate
from crosstill.cache import build
from crosstill.data import scenes as scenery
from crosstill.train import TrainConfig, train
from support import SETTINGS, SmallTeacher, small_student
from verbs import crosstill

ODD = {
    "long": "a dog and " * 1_000,
    "controls": "red \x1b[31m alert \x07 and \x00 nothing \x9b2J",
    "Arabic": "كلب يركض في الثلج",
    "Chinese": "一只狗在雪地里奔跑",
    "emoji": "👩‍👩‍👧‍👦 🐕🏽 in ❄️",
    "combining": "z̷̡̛a̶l̴g̵o̸ dog",
    "right to left mark": "a dog \u202e wons ni",
    "inner lines": "a dog\nin\tsnow",
    "one letter": "x",
    "a letter that is no letter of the vocabulary": "𓀀",
}
RAW = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def listing(tmp_path_factory) -> Path:
    """Forty scenes, one of whose five captions, or all of them, are odd."""
    listing = scenery.write(tmp_path_factory.mktemp("captions") / "photos", 40)
    record = json.loads(listing.read_text())
    for item, text in zip(record["images"], ODD.values(), strict=False):
        item["sentences"][2]["raw"] = text
    rest = record["images"][len(ODD) :]
    for item, text in zip(rest, ("", " \t\n", "\u200b\u200d", "\x00"), strict=False):
        item["sentences"][1]["raw"] = text
    rest[4]["sentences"][0]["raw"] = "broken \ud800 half"
    rest[5]["sentences"] = [{"raw": "five times the same"}] * 5
    for item in rest[6:12]:
        item["sentences"][3]["raw"] = "one caption of many"
    rest[12]["sentences"] = [{"raw": " "}]
    for number, item in enumerate(record["images"]):
        item["split"] = "val" if number % 4 == 0 else "train"
    listing.write_text(json.dumps(record))
    return listing


def test_what_was_done_is_said(listing):
    pairs = data.open(listing)
    assert pairs.notes[:2] == (
        "captions with broken Unicode, each now a '?': 1",
        "empty captions left out: 5",
    )
    assert "photos without captions: 1" in pairs.notes and not pairs.quarantine.rows
    told = {caption for example in pairs.examples for caption in example.captions}
    assert {text.strip() for text in ODD.values()} <= told, "kept as they are"
    assert "broken ? half" in told


def test_they_are_cached_trained_on_and_measured(listing, tmp_path):
    pairs, teacher = data.open(listing), SmallTeacher()
    cache = build(teacher, pairs, tmp_path / "cache")
    assert sorted(cache.texts) == sorted(c for e in pairs.examples for c in e.captions)
    student = small_student(cache)
    config = TrainConfig(**SETTINGS).changed(["epochs=1"])
    run = train(student, cache, config, tmp_path / "run")
    assert run is not None
    val = pairs.split("val")
    for model in (teacher, student):
        found = evaluate.retrieval(model, val).recall
        assert found.captions == sum(len(example.captions) for example in val.examples)
        assert 0 <= found.rsum <= 600
    assert student.count_truncated(cache.texts) >= 1


def test_none_of_it_reaches_the_terminal_raw(listing, tmp_path):
    done = [
        crosstill("cache", "none", listing, "--out", tmp_path / "cache"),
        crosstill("cache", "verify", tmp_path / "cache"),
        crosstill("doctor", listing),
        crosstill("doctor", listing, "--json"),
    ]
    assert "empty captions left out: 5" in done[0].stderr
    for each in done:
        assert not RAW.search(each.stdout + each.stderr)
    findings = json.loads(done[-1].stdout)["data"]["findings"]
    counted = {found["finding"]: found["count"] for found in findings}
    wanted = {"shared captions": 1, "equal captions": 1, "long captions": 1, "control codes": 2}
    assert counted.items() >= wanted.items()
    (shared,) = (found for found in findings if found["finding"] == "shared captions")
    assert shared["rows"][0]["caption"] == "one caption of many"
    assert len(shared["rows"][0]["images"]) == 6
    assert r"red \x1b[31m alert" in done[2].stdout
