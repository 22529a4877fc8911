"""The recipes of the papers' datasets: their numbers are the papers', and they train."""

import json

import pytest

from crosstill import recipes
from crosstill.students.student_config import PRESETS
from verbs import TOML, crosstill

NAMES = ("flickr30k", "coco")


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_dsmd(name):
    """AdamW, 20 epochs of 64 at 1e-4, a tenth of it from epoch 10; τ, K, m and T."""
    found = recipes.config(name).model_dump()
    assert found["recipe"] == name
    expected = {
        "epochs": 20,
        "batch_size": 64,
        "steps_per_epoch": None,
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "schedule": "step",
        "milestones": (10,),
        "gamma": 0.1,
        "warmup_steps": 0,
        "clip_norm": None,
        "normalise": True,
        "freeze": "none",
        "init_heads": "random",
        "center": False,
        "captions_per_image": 1,
        "balance": {"name": "dsmd", "temperature": 1.0},
        "losses": {
            "contrastive": {"temperature": 0.05, "queue_size": 8192, "mask_same_image": False},
            "feature": {},
            "similarity": {},
            "hard_negative": {"margin": 0.0, "negatives": "hardest", "mask_same_image": False},
        },
    }
    assert {key: found[key] for key in expected} == expected


def test_they_differ_from_dsmd_in_what_the_paper_does_not_have():
    ours, theirs = recipes.dsmd().model_dump(), recipes.flickr30k().model_dump()
    differing = {"recipe", "losses", "balance", "center", "init_heads"}
    assert {key for key in ours if ours[key] != theirs[key]} == differing
    assert theirs | {"recipe": "coco"} == recipes.coco().model_dump()


def test_the_released_code_of_dsmd():
    """What scripts/train.sh of its repository runs; its balancer has no other options."""
    released = recipes.config("dsmd_released").model_dump()
    expected = {
        "epochs": 30,
        "batch_size": 128,
        "shuffle": False,
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "schedule": "step",
        "milestones": (20,),
        "gamma": 0.1,
        "balance": {"name": "dsmd_scaled"},
        "losses": {
            "contrastive": {"mask_same_image": False},
            "feature": {},
            "similarity": {},
            "hard_negative": {"margin": 0.05, "negatives": "all", "mask_same_image": False},
        },
    }
    assert {key: released[key] for key in expected} == expected
    shorter = recipes.config("dsmd_released", ["epochs=2", "batch_size=64", "shuffle=true"])
    assert (shorter.epochs, shorter.batch_size, shorter.shuffle) == (2, 64, True)


def test_the_students_are_the_papers():
    paper = PRESETS["paper"]
    assert paper.image.source == "google/vit-base-patch16-224-in21k"
    assert paper.text.source == "google-bert/bert-base-uncased"
    assert (paper.image.pooling, paper.text.pooling, paper.bias) == ("cls", "pooler", True)
    assert paper.max_length == 30


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_of_each(cached, tmp_path, name):
    (tmp_path / "student.toml").write_text(TOML)
    crosstill(
        *("train", cached.folder, "--recipe", name, "--student", tmp_path / "student.toml"),
        *("--out", tmp_path / "run", "--set", "epochs=1", "--set", "steps_per_epoch=2"),
        *("--set", "losses.contrastive.queue_size=64"),
    )
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["settings"]["recipe"] == name
    assert record["settings"]["losses"]["contrastive"]["mask_same_image"] is False
    found = crosstill("evaluate", tmp_path / "run", "scenes:60", "--protocol", "karpathy", "--json")
    told = json.loads(found.stdout)
    assert 0 < told["rsum"] <= 600 and "teacher" in told
