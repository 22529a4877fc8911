"""A queue is no longer than there are training captions, through the command line."""

import json
import logging

import pytest
from safetensors.torch import load_file

from crosstill.errors import ConfigError
from crosstill.train import TrainConfig, train
from crosstill.train.task import PairTask
from support import small_student
from verbs import TOML, crosstill, refusal

FEW = ("epochs=1", "steps_per_epoch=3", "batch_size=24", "save_every=1")
CAPTIONS = 240  # of the training split


@pytest.fixture
def typed(cached, tmp_path):
    """Make the words of a training with some changes."""
    (tmp_path / "small.toml").write_text(TOML)

    def words(*changes: str, recipe: str = "dsmd") -> list[object]:
        sets = [word for change in (*FEW, *changes) for word in ("--set", change)]
        student = ("--student", tmp_path / "small.toml")
        return [
            "train",
            cached.folder,
            "--out",
            tmp_path / "run",
            *student,
            "--recipe",
            recipe,
            *sets,
        ]

    return words


def slots(run) -> int:
    """How long the queue of the newest checkpoint is."""
    newest = max((run / "checkpoints").glob("*.safetensors"))
    (queue,) = [v for k, v in load_file(newest).items() if k.endswith("queue.entries")]
    return queue.shape[1]


def test_a_queue_that_nobody_set_shrinks_and_says_so(typed, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "crosstill"):
        crosstill(*typed())
    (line,) = [line for line in caplog.messages if "slots" in line]
    assert line.startswith(
        f"contrastive: a queue of {CAPTIONS} slots in place of 8,192, as long as the {CAPTIONS} "
        "captions of split 'train'"
    )
    assert slots(tmp_path / "run") == CAPTIONS
    kept = json.loads((tmp_path / "run/config.json").read_text())["settings"]["losses"]
    assert kept["contrastive"] == {"queue_size": CAPTIONS}


@pytest.mark.parametrize(
    ("recipe", "size"), [("dsmd", CAPTIONS + 1), ("flickr30k", None), ("coco", None)]
)
def test_a_length_that_was_set_is_refused_by_name(typed, tmp_path, recipe, size):
    changes = [f"losses.contrastive.queue_size={size}"] if size else []
    message = refusal(*typed(*changes, recipe=recipe))
    assert f"losses.contrastive.queue_size = {size or 8192} (recipe {recipe})" in message
    assert f"--set losses.contrastive.queue_size={CAPTIONS}" in message
    assert not (tmp_path / "run").exists()
    crosstill(*typed(f"losses.contrastive.queue_size={CAPTIONS}", recipe=recipe))
    assert slots(tmp_path / "run") == CAPTIONS


def test_a_run_from_before_goes_on_with_its_long_queue(cached, tmp_path, monkeypatch):
    """Such a run has 8,192 slots, which its settings do not tell."""

    def dies(task, batch):
        if task.losses["contrastive"].queue.pointer[0] >= 24:
            raise KeyboardInterrupt
        return backward(task, batch)

    backward = PairTask.backward
    config = TrainConfig().changed(FEW)
    with monkeypatch.context() as before:
        before.setattr("crosstill.train.loop.fit_queues", lambda cache, config: (config, []))
        before.setattr(PairTask, "backward", dies)
        with pytest.raises(KeyboardInterrupt):
            train(small_student(cached), cached, config, tmp_path / "run")
    assert slots(tmp_path / "run") == 8192
    crosstill("train", cached.folder, "--out", tmp_path / "run", "--resume")
    assert slots(tmp_path / "run") == 8192


def test_a_run_resumes_with_settings_that_leave_the_length_open(cached, tmp_path):
    config = TrainConfig().changed(FEW)
    train(small_student(cached), cached, config, tmp_path / "run")
    train(None, cached, config, tmp_path / "run", resume=True)
    with pytest.raises(ConfigError, match="was started with losses"):
        other = config.changed(["losses.contrastive.queue_size=9"])
        train(None, cached, other, tmp_path / "run", resume=True)
