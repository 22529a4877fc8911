import torch
from torch.nn.functional import normalize

from crosstill.cache import build, centring
from crosstill.train import Run
from crosstill.train.task import learnt_rows
from support import SmallTeacher
from verbs import TOML, crosstill, refusal

WORDS = [
    word
    for change in ("epochs=1", "batch_size=8", "steps_per_epoch=2", "losses=feature+similarity")
    for word in ("--set", change)
]


class FlatTeacher(SmallTeacher):
    """Its rows point to all sides: every other one is turned round."""

    def embed_images(self, pixels):
        return self._turned(super().embed_images(pixels))

    def embed_texts(self, texts):
        return self._turned(super().embed_texts(texts))

    def identity(self):
        return super().identity() | {"family": "flat"}

    def _turned(self, rows):
        last = (rows[:, -1] * 1e6).round().long() % 2
        return rows * (1 - 2 * last)[:, None]


def test_rows_are_less_their_modality_s_mean_and_unit(cached):
    means = {
        "image": cached.image_features(cached.split("train").images).mean(0),
        "text": cached.text_features(cached.split("train").captions).mean(0),
    }
    val = cached.split("val")
    rows = centring.centred(cached, "train", True)
    expected = normalize(cached.image_features(val.images) - means["image"], dim=-1)
    torch.testing.assert_close(rows.image_features(val.images), expected)
    expected = normalize(cached.text_features(val.captions) - means["text"], dim=-1)
    torch.testing.assert_close(rows.text_features(val.captions), expected)
    assert centring.centred(cached, "train", False) is cached
    assert not cached.means


def test_a_long_mean_is_taken_off_unless_the_user_says_no(cached, scenes, tmp_path, settings):
    lengths = [float(mean.norm()) for mean in learnt_rows(cached, settings).means.values()]
    assert len(lengths) == 2 and max(lengths) > 0.5
    assert not learnt_rows(cached, settings.changed(["center=false"])).means
    flat = build(FlatTeacher(), scenes, tmp_path / "flat")
    assert not learnt_rows(flat, settings).means
    assert learnt_rows(flat, settings.changed(["center=true"])).means


def test_a_run_says_that_rows_are_centred_and_keeps_the_teacher_s_own_recall(
    cached, tmp_path, caplog
):
    caplog.set_level("INFO")
    (tmp_path / "small.toml").write_text(TOML)
    for name in ("true", "false"):
        caplog.clear()
        words = (*WORDS, "--student", tmp_path / "small.toml", "--set", f"center={name}")
        crosstill("train", cached.folder, *words, "--out", tmp_path / name)
        assert ("--set center=false learns them as they are" in caplog.text) == (name == "true")
    runs = [Run(tmp_path / name) for name in ("true", "false")]
    assert len({run.metrics["teacher"]["rsum"] for run in runs}) == 1
    assert len({(run.folder / "events.jsonl").read_text() for run in runs}) == 2


def test_rows_that_are_not_there_cannot_be_centred(scenes, tmp_path):
    build(None, scenes, tmp_path / "captions")
    (tmp_path / "small.toml").write_text(TOML)
    words = (tmp_path / "captions", "--student", tmp_path / "small.toml", "--out", tmp_path / "run")
    line = refusal("train", *words, "--set", "center=true", "--set", "batch_size=8")
    assert "holds no features of a teacher to centre; leave it out" in line
