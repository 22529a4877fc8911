"""Caches that keep how long a teacher's rows are before their L2 normalisation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crosstill import cache as caches
from crosstill import data, images, students
from crosstill.cache import Cache, build
from crosstill.errors import InputError
from support import RawTeacher
from verbs import TOML, crosstill, refusal

SCENES = "scenes:60"
STEADY = TOML.replace(
    "hidden_size", "hidden_dropout_prob = 0.0\nattention_probs_dropout_prob = 0.0\nhidden_size"
)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    """A folder of vectors of lengths 0.5 to 20 for every photo and caption of the scenes."""
    folder, random = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    examples = data.open(SCENES).examples
    texts = sorted({text for example in examples for text in example.captions})
    names = {"filenames.txt": [e.path for e in examples], "captions.txt": texts}
    for (name, lines), array in zip(names.items(), ("images.npy", "text.npy"), strict=True):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
        rows = random.standard_normal((len(lines), 16)) * random.uniform(0.2, 5, (len(lines), 1))
        np.save(folder / array, rows.astype(np.float32))
    return folder


def test_raw_rows_stand_beside_the_very_same_unit_rows(vectors, tmp_path):
    crosstill("cache", vectors, SCENES, "--out", tmp_path / "plain")
    said = crosstill("cache", vectors, SCENES, "--raw", "--out", tmp_path / "raw").output
    assert "16 wide with the lengths of raw rows" in said
    plain, raw = Cache(tmp_path / "plain"), Cache(tmp_path / "raw")
    assert "raw" not in plain.header["key"] and plain.digest != raw.digest
    rows, texts = np.arange(len(raw.image_ids)), np.arange(len(raw.texts))
    for ours, theirs in zip(
        raw.features(rows, texts[: len(rows)]),
        plain.features(rows, texts[: len(rows)]),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    names = (vectors / "filenames.txt").read_text().splitlines()
    file = dict(zip(names, np.load(vectors / "images.npy"), strict=True))
    wanted = torch.tensor(np.stack([file[path] for path in raw.paths]))
    torch.testing.assert_close(raw.image_features(rows, raw=True), wanted, rtol=2e-3, atol=1e-2)
    captions = (vectors / "captions.txt").read_text().splitlines()
    said = dict(zip(captions, np.load(vectors / "text.npy"), strict=True))
    wanted = torch.tensor(np.stack([said[text] for text in raw.texts]))
    torch.testing.assert_close(raw.text_features(texts, raw=True), wanted, rtol=2e-3, atol=1e-2)
    with pytest.raises(InputError, match="keeps unit rows alone; make it anew with --raw"):
        plain.image_features(rows, raw=True)
    again = refusal("cache", vectors, SCENES, "--out", tmp_path / "raw")
    assert "of another choice of --raw; give another --out" in again


def step_of(run: Path) -> dict:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(event for event in events if event["kind"] == "step")


@pytest.mark.parametrize("normalise", ["true", "teacher", "false"])
def test_losses_see_the_rows_that_the_setting_names(vectors, tmp_path, normalise):
    crosstill("cache", vectors, SCENES, "--raw", "--dtype", "fp32", "--out", tmp_path / "raw")
    cached = Cache(tmp_path / "raw")
    split = cached.split("train")
    (tmp_path / "small.toml").write_text(STEADY)
    changes = {"losses": "feature", "balance": "fixed", "normalise": normalise, "epochs": 1}
    changes |= {"batch_size": len(split.captions), "log_every": 1, "val_split": "val"}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    words = ["--student", tmp_path / "small.toml", *words]
    crosstill("train", tmp_path / "raw", *words, "--out", tmp_path / "run")
    student = students.load(tmp_path / "run/student")
    photos = torch.stack(
        [
            images.load(cached.photo(row), "", student.preprocess)
            for row in split.images[split.owner]
        ]
    )
    texts = [cached.texts[row] for row in split.captions]
    raw = normalise == "false"
    pairs = zip(
        (student.raw_images(photos), student.raw_texts(texts)),
        (
            cached.image_features(split.images[split.owner], raw=raw),
            cached.text_features(split.captions, raw=raw),
        ),
        strict=True,
    )
    wanted = 0.0
    for ours, theirs in pairs:
        seen = torch.nn.functional.normalize(ours) if normalise == "true" else ours
        wanted += float((seen - theirs).abs().mean())
    assert step_of(tmp_path / "run")["losses"]["feature"] == pytest.approx(wanted, rel=1e-4)


def test_without_raw_rows_a_run_says_whose_are_unit(cached, tmp_path, caplog):
    (tmp_path / "small.toml").write_text(TOML)
    words = ["--student", tmp_path / "small.toml", "--set", "losses=feature", "--set", "epochs=1"]
    words += ["--set", "batch_size=16", "--set", "steps_per_epoch=1", "--set", "normalise=false"]
    said = crosstill("train", cached.folder, *words, "--out", tmp_path / "run")
    assert re.search(
        "keeps unit rows alone.*`crosstill cache --raw` keeps both", said.output + caplog.text
    )
    crosstill(
        "train", cached.folder, *words, "--set", "normalise=both", "--out", tmp_path / "b", code=2
    )


def test_a_killed_build_goes_on_to_the_same_bytes(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("crosstill.cache.cache_builder.SHARD_ROWS", 16)
    whole = build(RawTeacher(), scenes, tmp_path / "whole", raw=True)
    with pytest.raises(KeyboardInterrupt):
        build(RawTeacher(limit=3), scenes, tmp_path / "killed", raw=True)
    build(RawTeacher(), scenes, tmp_path / "killed", raw=True)
    shards = [path.name for path in whole.folder.glob("*.npy")]
    assert len(shards) > 4
    for name in shards:
        assert (tmp_path / "killed" / name).read_bytes() == (whole.folder / name).read_bytes()
    lengths = whole.text_features(np.arange(9), raw=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((9,), 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("stretch", [1e6, 1e-7])
def test_lengths_that_the_stored_type_cannot_hold(scenes, tmp_path, stretch):
    teacher = RawTeacher()
    teacher.stretch = stretch
    with pytest.raises(Exception, match="long, which fp16 cannot hold; use --dtype fp32"):
        build(teacher, scenes, tmp_path / "c", raw=True)
    kept = build(teacher, scenes, tmp_path / "d", raw=True, dtype="fp32")
    lengths = kept.image_features(np.arange(3), raw=True).norm(dim=1)
    torch.testing.assert_close(lengths / stretch, torch.ones(3), rtol=1e-3, atol=0)


def test_a_student_as_teacher_gives_raw_rows(cached, student, tmp_path):
    student.save(tmp_path / "student")
    crosstill("cache", tmp_path / "student", "scenes:12", "--raw", "--out", tmp_path / "c")
    kept = Cache(tmp_path / "c")
    wanted = students.load(tmp_path / "student").raw_texts(kept.texts)
    found = kept.text_features(np.arange(len(kept.texts)), raw=True)
    torch.testing.assert_close(found, wanted, rtol=3e-3, atol=3e-3)


def test_where_there_are_no_raw_rows_it_is_refused(scenes, bundle_folder, tmp_path):
    out = ("--raw", "--out", tmp_path / "c")
    assert "there are no rows to keep; leave it out" in refusal("cache", "none", SCENES, *out)
    alone = refusal("cache", bundle_folder, SCENES, *out)
    assert "gives unit rows alone" in alone and "leave --raw out" in alone


def test_a_joined_cache_has_unit_rows(vectors, cached, tmp_path):
    crosstill("cache", vectors, SCENES, "--raw", "--out", tmp_path / "raw")
    words = (tmp_path / "raw", cached.folder)
    crosstill("join", *words, "--out", tmp_path / "joined")
    joined = caches.open(tmp_path / "joined")
    assert not joined.raw and joined.dim == 32
    torch.testing.assert_close(
        joined.text_features(np.arange(5)).norm(dim=1), torch.ones(5), rtol=2e-3, atol=0
    )
