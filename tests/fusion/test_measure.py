"""Every pair scored once, whatever the blocks, and exactly as one pair alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crosstill import data, images, students
from crosstill.errors import DataError, ImageError, ModelError
from crosstill.evaluate import embed, embedding
from crosstill.fusion import measure
from crosstill.fusion.measure import Scored, score_matrix
from crosstill.models import open as open_model
from crosstill.teachers.features import FeaturesTeacher
from evaluate.judges import SmallJudge, pictures, small_meter, texts_of
from support import small_config
from teachers.fusion_models import save


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


def alone(model, pairs) -> torch.Tensor:
    """The scores, pair by pair."""
    photos = [images.load(pairs.read(e), e.path, model.preprocess) for e in pairs.examples]
    rows = [[model.score([photo], [text]) for text in texts_of(pairs)] for photo in photos]
    return torch.tensor(rows)


def broken(pairs, *paths: str):
    """The dataset with rubbish in some files."""
    return replace(pairs, read=lambda e: b"rubbish" if e.path in paths else pairs.read(e))


def test_the_matrix_equals_one_pair_at_a_time():
    pairs, model = pictures(5, 3), SmallJudge()
    found = score_matrix(model, pairs)
    close(found.scores, alone(model, pairs))
    assert found.truth.owner.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert found.image_ids == [example.image_id for example in pairs.examples]
    assert found.passes == 75 and found.scores.std() > 0.1


def test_an_image_and_a_caption_go_through_their_towers_once():
    pairs, model = pictures(12, 3), SmallJudge()
    score_matrix(model, pairs)
    assert (model.seen, model.words, model.pairs) == (12, 36, 12 * 36)


@pytest.mark.parametrize("family", ["meter", "vilt", "blip"])
def test_true_models_in_blocks_equal_one_pair_at_a_time(family, tmp_path, monkeypatch):
    pairs = data.open("scenes:40").split("test")
    if family == "meter":
        small_meter(tmp_path, texts_of(pairs))
    else:
        save(family, tmp_path, texts_of(pairs))
    model = open_model(tmp_path, "matcher")
    monkeypatch.setattr(embedding, "BATCH", 3)
    monkeypatch.setattr(measure, "PASSES", 1)
    found = score_matrix(model, pairs)
    assert found.scores.shape == (4, 20) and found.scores.std() > 1e-3
    close(found.scores, alone(model, pairs))


def small_blocks(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(embedding, "BATCH", rows)
    monkeypatch.setattr(measure, "BATCH", rows)


def test_blocks_change_nothing(monkeypatch):
    pairs = pictures(11, 3)
    whole = score_matrix(SmallJudge(), pairs)
    small_blocks(monkeypatch, 4)
    monkeypatch.setattr(measure, "PASSES", 1)
    model = SmallJudge()
    found = score_matrix(model, pairs)
    close(found.scores, whole.scores)
    assert (model.seen, model.words, model.pairs) == (11, 33, 11 * 33)


def test_captions_that_cannot_be_kept_are_read_again_for_each_block(monkeypatch):
    pairs = pictures(11, 3)
    whole = score_matrix(SmallJudge(), pairs)
    small_blocks(monkeypatch, 4)  # 3 blocks of images, 9 of captions
    monkeypatch.setattr(measure, "KEPT", 0)
    model = SmallJudge()
    found = score_matrix(model, pairs)
    close(found.scores, whole.scores)
    assert (model.seen, model.words, model.pairs) == (11, 3 * 33, 11 * 33)
    monkeypatch.setattr(measure, "KEPT", 4 * 16 * 12 * 4)  # a block or two of short captions
    score_matrix(model, pairs)
    assert 33 < model.words - 3 * 33 < 3 * 33


def test_only_what_is_wanted_is_scored(monkeypatch):
    pairs = pictures(7, 2)
    small_blocks(monkeypatch, 3)
    wanted = torch.rand(7, 14, generator=torch.Generator().manual_seed(0)) < 0.2
    model = SmallJudge()
    found = measure.score(model, pairs, wanted)
    assert found.passes == model.pairs == int(wanted.sum())
    assert found.scores[~wanted].eq(-torch.inf).all()
    whole = score_matrix(SmallJudge(), pairs).scores
    close(found.scores[wanted], whole[wanted])


def test_an_unreadable_image_is_left_out_with_its_captions():
    pairs = pictures(6, 2)
    found = score_matrix(SmallJudge(), broken(pairs, "2.png"))
    assert [row["path"] for row in found.quarantine.rows] == ["2.png"]
    assert found.scores.shape == (5, 10) and found.passes == 50
    whole = score_matrix(SmallJudge(), pairs).scores
    kept = [0, 1, 3, 4, 5]
    columns = [column for row in kept for column in (2 * row, 2 * row + 1)]
    close(found.scores, whole[kept][:, columns])
    assert found.truth.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_strict_and_nothing_left():
    pairs = pictures(3, 2)
    with pytest.raises(ImageError, match="1.png: not an image"):
        score_matrix(SmallJudge(), broken(pairs, "1.png"), strict=True)
    with pytest.raises(DataError, match="all 3 images are unreadable"):
        score_matrix(SmallJudge(), broken(pairs, "0.png", "1.png", "2.png"))


def test_an_image_that_breaks_after_it_was_checked():
    with pytest.raises(ImageError, match="1.png"):
        measure.score(SmallJudge(), broken(pictures(3, 2), "1.png"))


def test_scores_that_are_no_numbers():
    model = SmallJudge()
    torch.nn.init.constant_(model.bilinear.weight, torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        score_matrix(model, pictures(3, 2))


def test_training_mode_is_as_before():
    model = SmallJudge().train()
    score_matrix(model, pictures(3, 2))
    assert model.training


# --- opening ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A METER-shaped model, a run that trained one, a dual encoder and a folder of vectors."""
    home = tmp_path_factory.mktemp("models")
    texts = texts_of(pictures())
    small_meter(home / "meter", texts)
    small_meter(home / "run/best", texts)
    (home / "run/config.json").write_text('{"format": 1}')
    students.build(small_config(), dim=8, captions=texts).save(home / "dual")
    save("vilt", home / "vilt_run/best")
    (home / "vectors").mkdir()
    (home / "vectors/filenames.txt").write_text("a.png\n")
    np.save(home / "vectors/image.npy", np.ones((1, 4), np.float32))
    return home


@pytest.mark.parametrize(
    ("name", "family"), [("meter", "meter"), ("run", "meter"), ("vilt_run", "vilt")]
)
def test_a_fusion_model_opens_from_its_folder_and_from_a_run(folders, name, family):
    for want in ("any", "live", "matcher"):
        assert open_model(folders / name, want).family == family


def test_each_kind_is_refused_where_the_other_is_needed(folders):
    with pytest.raises(ModelError, match="reads pairs and has no embeddings; give a dual") as told:
        open_model(folders / "run", "encoder")
    assert "\n" not in str(told.value) and str(folders / "run") in str(told.value)
    with pytest.raises(ModelError, match="a dual encoder, which does not read pairs") as told:
        open_model(folders / "dual", "matcher")
    assert "\n" not in str(told.value) and str(folders / "dual") in str(told.value)
    for want in ("live", "encoder", "matcher"):
        with pytest.raises(ModelError, match="vectors without a model"):
            open_model(folders / "vectors", want)
    assert isinstance(open_model(folders / "vectors"), FeaturesTeacher)


@pytest.mark.parametrize("header", ["cache.json", "scores.json"])
def test_a_cache_of_either_kind_is_no_model(tmp_path, header):
    (tmp_path / header).write_text("{}")
    with pytest.raises(ModelError, match="a cache, not a model"):
        open_model(tmp_path)


def test_what_comes_back_is_public():
    assert isinstance(score_matrix(SmallJudge(), pictures(2, 1)), Scored)


def test_a_model_says_what_it_can_do(folders):
    kinds = {name: open_model(folders / name).kind for name in ("run", "dual", "vectors")}
    assert kinds == {"run": "matcher", "dual": "encoder", "vectors": "vectors"}


@pytest.mark.parametrize(
    ("name", "reason"), [("vectors", "cannot embed new images"), ("run", "has no embeddings")]
)
def test_what_cannot_embed_is_refused_in_one_line(folders, name, reason):
    with pytest.raises(ModelError, match=reason) as refusal:
        embed(open_model(folders / name), pictures(2, 1))
    assert "\n" not in str(refusal.value)
