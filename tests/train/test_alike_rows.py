"""A run whose rows become alike says so, through the command line."""

import json
import logging

import pytest
import torch
from torch.nn import functional

from crosstill.cache import build
from support import SmallTeacher
from verbs import TOML, crosstill

# a tower of photos whose rows come apart within a second
QUICK = """
name = "quick"

[image.config]
model_type = "resnet"
embedding_size = 8
hidden_sizes = [16, 32]
depths = [1, 1]
layer_type = "basic"
image_size = 32

"""
QUICK += TOML[TOML.index("[text.config]") :]
COLLAPSING = ("losses=hard_negative", "losses.hard_negative.margin=0", "lr=0.01")
SOUND = ("losses.hard_negative.margin=0.2", "init_heads=ridge", "lr=0.001", "epochs=6")


class EvenTeacher(SmallTeacher):
    """As the small teacher, with rows that share no large mean."""

    def embed_images(self, pixels):
        cells = functional.adaptive_avg_pool2d(pixels.float() / 255, 4).flatten(2)
        return functional.normalize((cells - cells.mean(2, keepdim=True)).flatten(1) @ self._image)

    def embed_texts(self, texts):
        counts = torch.tensor([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts])
        return functional.normalize((counts - counts.float().mean(1, keepdim=True)) @ self._text)


@pytest.fixture(scope="module")
def even(scenes, tmp_path_factory):
    return build(EvenTeacher(), scenes, tmp_path_factory.mktemp("even") / "cache")


@pytest.fixture
def teach(even, tmp_path, caplog):
    """Train with some changes; returns the epochs' events, the summary, and what was logged."""
    (tmp_path / "quick.toml").write_text(QUICK)

    def run(*changes: str):
        typed = ["epochs=3", "batch_size=24", "schedule=constant", "center=false", *changes]
        out = tmp_path / "run"
        with caplog.at_level(logging.INFO, "crosstill"):
            crosstill(
                *("train", even.folder, "--out", out, "--student", tmp_path / "quick.toml"),
                *("--recipe", "dsmd"),
                *(word for change in typed for word in ("--set", change)),
            )
        lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        summary = json.loads((out / "metrics.json").read_text())
        return [line for line in lines if line["kind"] == "epoch"], summary, caplog.messages

    return run


def test_a_collapsing_run_is_named_with_the_loss_and_what_to_set(teach):
    epochs, _, logged = teach(*COLLAPSING)
    (warning,) = [line for line in logged if "rows are alike" in line]
    assert "photos have a mean cosine of" in warning and "the teacher's 0.14" in warning
    assert warning.endswith("likely hard_negative: set losses.hard_negative.margin=0.2")
    assert next(line for line in logged if line.startswith("epoch 3/3")).endswith("  rows alike")
    assert epochs[-1]["mean_cosine"]["text"] > 0.99


def test_a_sound_run_says_nothing_and_keeps_the_figures(teach):
    epochs, summary, logged = teach(*SOUND)
    assert not any("alike" in line for line in logged)
    assert summary["teacher_mean_cosine"] == epochs[0]["teacher_mean_cosine"]
    assert summary["teacher_mean_cosine"]["image"] == pytest.approx(0.14, abs=0.01)
    best = epochs[summary["best"]["epoch"] - 1]
    assert summary["best"]["mean_cosine"] == best["mean_cosine"]
    assert best["mean_cosine"].keys() == {"image", "text"}


def test_rows_that_stay_alike_are_told_before_the_end(teach):
    _, _, logged = teach(*COLLAPSING, "epochs=4")
    told = [line.startswith("epoch") for line in logged if "alike" in line]
    # the first epoch has none before it; the warning itself comes once
    assert told == [True, False, True, True]
    assert logged.index(next(w for w in logged if "rows are alike" in w)) < len(logged) - 2


def test_the_largest_part_of_the_total_is_named_where_no_loss_has_a_remedy(teach):
    _, _, logged = teach("losses=feature+similarity", "lr=1e-6")
    (warning,) = [line for line in logged if "rows are alike" in line]
    assert "likely " in warning and "largest part of the total" in warning
    assert "set lr below 1e-06, add losses.info_nce=true, or train longer" in warning
