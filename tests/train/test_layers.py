"""Losses that look inside: a live teacher of real towers, and photos with blanked patches."""

import json
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from crosstill import cache, objectives, teachers
from crosstill.errors import ConfigError, MismatchError, ModelError
from crosstill.towers import vocabulary
from crosstill.train import train
from crosstill.train.layers import LayerTap, as_map, blank
from support import matrix, same, small_student


@pytest.fixture(scope="module")
def live(tmp_path_factory, scenes):
    """A dual encoder's folder: ViT (16 px, patches of 4) and BERT, random."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    texts = [text for example in scenes.examples for text in example.captions]
    tokenizer = vocabulary.train(texts, 300)
    width = {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    image = ViTConfig(image_size=16, patch_size=4, **width)
    text = BertConfig(vocab_size=len(tokenizer), **width)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=16)
    model = VisionTextDualEncoderModel(config, ViTModel(image), BertModel(text))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def told(live, scenes, tmp_path_factory):
    """What that teacher said about the scenes."""
    return cache.build(teachers.load(live), scenes, tmp_path_factory.mktemp("cache") / "c")


def changed(settings, losses, *changes):
    return settings.changed([f"losses={losses}", "balance=fixed", "epochs=1", *changes])


LIVE = ["fitnets", "at", "fitnets+at+info_nce"]


@pytest.mark.parametrize("losses", matrix(LIVE, LIVE[-1:]))
def test_a_run_with_a_live_teacher_learns_and_resumes(losses, live, told, settings, tmp_path):
    config = changed(settings, losses, f"teacher={live}", "lr=3e-3").changed(["epochs=3"])
    run = train(small_student(told), told, config, tmp_path / "run")
    lines = (tmp_path / "run/events.jsonl").read_text().splitlines()
    steps = [json.loads(line)["losses"] for line in lines if '"kind": "step"' in line]
    for name in set(losses.split("+")) - {"info_nce"}:
        assert steps[-1][name] < steps[0][name]
    # resumed from the last checkpoint but one, it ends with the same weights
    newest = sorted((tmp_path / "run/checkpoints").iterdir())
    assert len(newest) >= 2
    shutil.rmtree(newest[-1]) if newest[-1].is_dir() else newest[-1].unlink()
    (tmp_path / "run/metrics.json").unlink()
    again = train(None, told, config, tmp_path / "run", resume=True)
    assert same(again.best.state_dict(), run.best.state_dict())


def test_a_cache_alone_is_refused_in_one_line(told, settings, tmp_path):
    with pytest.raises(MismatchError, match="fitnets: reads intermediate layers.*--set teacher="):
        train(small_student(told), told, changed(settings, "fitnets"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_teacher_is_refused(live, cached, settings, tmp_path):
    config = changed(settings, "at", f"teacher={live}")
    with pytest.raises(MismatchError, match="is not what filled"):
        train(small_student(cached), cached, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_named(told, settings, tmp_path):
    config = changed(settings, "at", f"teacher={tmp_path / 'nowhere'}")
    with pytest.raises(ModelError, match="^teacher = .*nowhere: "):
        train(small_student(told), told, config, tmp_path / "run")


def test_a_student_can_be_the_live_teacher(scenes, settings, tmp_path):
    teacher = small_student(cache.build(None, scenes, tmp_path / "none"))
    teacher.save(tmp_path / "teacher")
    seen = cache.build(teacher.load(tmp_path / "teacher"), scenes, tmp_path / "cache")
    config = changed(settings, "fitnets+feature", f"teacher={tmp_path / 'teacher'}").changed(
        ["steps_per_epoch=2"]
    )
    assert train(small_student(seen), seen, config, tmp_path / "run").metrics["steps"] > 0


@pytest.mark.parametrize("loss", ["at", "masked_feature"])
def test_gradnorm_sees_no_gradient_of_them(loss, live, told, settings, tmp_path):
    config = changed(settings, f"{loss}+feature", f"teacher={live}", "balance=gradnorm")
    with pytest.raises(ConfigError, match=f"balance = gradnorm.*{loss} has none"):
        train(small_student(told), told, config, tmp_path / "run")


@pytest.mark.parametrize("change", ["freeze=image", "chunk_size=4", "compile=true"])
@pytest.mark.parametrize("loss", ["fitnets", "masked_feature"])
def test_settings_in_the_way_are_refused(change, loss, live, told, settings, tmp_path):
    config = changed(settings, loss, f"teacher={live}", change)
    with pytest.raises(ConfigError, match=f"{loss}: needs the image tower's whole pass"):
        train(small_student(told), told, config, tmp_path / "run")


def test_a_layer_that_is_not_there_is_refused(live, told, settings, tmp_path):
    config = changed(settings, "fitnets", f"teacher={live}", "losses.fitnets.layer=7")
    with pytest.raises(ConfigError, match="'7': ViTModel has 3 blocks; give first, middle, last"):
        train(small_student(told), told, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


AGAIN = """
from crosstill.objectives.masked_feature import MaskedFeature


class Again(MaskedFeature):
    pass
"""
WHOLE = """
from torch.nn.functional import mse_loss

from crosstill.objectives import Objective


class Whole(Objective):
    def forward(self, student, teacher, ids):
        return mse_loss(student.image, teacher.image)
"""


def test_each_masked_loss_has_its_own_ratio(told, settings, tmp_path, monkeypatch):
    for name, text in {"again": AGAIN, "whole": WHOLE}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    config = changed(settings, "masked_feature+again+whole", "losses.again.ratio=0", "log_every=1")
    run = train(small_student(told, dropout=0.0), told, config, tmp_path / "run")
    events = map(json.loads, (run.folder / "events.jsonl").read_text().splitlines())
    rows = [event["losses"] for event in events if "losses" in event]
    assert rows
    for row in rows:  # a ratio of 0 blanks nothing
        assert row["again"] == pytest.approx(row["whole"], rel=1e-5)
        assert row["masked_feature"] != pytest.approx(row["whole"], rel=1e-5)


def test_masked_photos_train_a_vit(told, settings, tmp_path):
    config = changed(settings, "masked_feature+info_nce", "lr=3e-3").changed(["epochs=2"])
    run = train(small_student(told), told, config, tmp_path / "run")
    assert run.metrics["best"]["rsum"] > 0


def test_blank_hides_the_asked_share_of_whole_patches():
    torch.manual_seed(0)
    photos = torch.randint(1, 255, (3, 3, 16, 18), dtype=torch.uint8)
    found = blank(photos, patch=4, ratio=0.25, mean=(0.0, 1.0, 0.5))
    changed = (found != photos).any(1)
    cells = changed[:, :, :16].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert torch.equal(cells.all(-1), cells.any(-1))
    assert cells.all(-1).flatten(1).sum(1).tolist() == [4, 4, 4]
    assert not changed[:, :, 16:].any()
    hidden = found.permute(0, 2, 3, 1)[changed].unique(dim=0)
    assert hidden.tolist() == [[0, 255, 128]]
    assert torch.equal(blank(photos, 4, 0.0, (0, 0, 0)), photos)


def test_tokens_become_maps():
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3)
    assert as_map(tokens)[1, :, 1, 0].tolist() == tokens[1, 3].tolist()
    assert torch.equal(as_map(tokens[:, 1:]), as_map(tokens))


def test_taps_keep_rows_in_order_and_only_while_listening():
    blocks = torch.nn.Module()
    blocks.layers = torch.nn.ModuleList([torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 2, 1)])
    taps = LayerTap(blocks, ["first", "1"])
    photos = torch.randn(4, 1, 3, 3)
    blocks.layers[0](photos)
    taps.listen()
    expected = [blocks.layers[0](part) for part in photos.split(2)]
    for part in expected:
        blocks.layers[1](part)
    found = taps.take().layers
    assert torch.equal(found["first"], torch.cat(expected))
    assert found["1"].shape == (4, 2, 3, 3)
