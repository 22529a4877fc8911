"""What all fusion models share."""

import pytest
import torch

from crosstill import teachers
from crosstill.errors import ConfigError, ModelError
from crosstill.fusion import families
from crosstill.fusion.matcher import Reader, half, joined, score_pairs
from crosstill.models import open as open_model
from crosstill.teachers.dual import BlipDual, BridgeTowerDual
from crosstill.types import States
from teachers.fusion_models import TEXTS, save


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")
    for family in ("vilt", "blip", "bridgetower", "bridgetower-dual"):
        save(family, place / family)
    return place


@pytest.mark.parametrize(
    ("depth", "kept"), [(6, [0, 3, 5]), (12, [0, 3, 5, 7, 9, 11]), (4, [0, 3]), (2, [1]), (1, [0])]
)
def test_half_keeps_the_first_and_every_other_to_the_last(depth, kept):
    assert half(depth) == kept


def test_states_of_several_lengths_are_joined_and_cut():
    short = States(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.int64))
    long = States(2 * torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.int64))
    whole = joined([short, long])
    assert whole.hidden.shape == (2, 4, 3) and whole.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert not whole.hidden[0, 2:].any()
    assert whole.take(torch.tensor([0])).hidden.shape == (1, 2, 3)


@pytest.mark.parametrize("room", [2**31, 4000, 0])
def test_a_reader_gives_the_states_of_its_texts_however_much_it_may_keep(folders, room):
    model = teachers.load(folders / "vilt")
    reader = Reader(model, TEXTS, room)
    for rows in ([2, 0], [1, 2, 3], [0]):
        states, expected = reader.states(rows), model.text_states([TEXTS[row] for row in rows])
        assert torch.equal(states.mask, expected.mask)
        real = states.mask.bool()
        assert torch.allclose(states.hidden[real], expected.hidden[real], atol=1e-6)


def test_a_reader_reads_each_text_once(folders, monkeypatch):
    model = teachers.load(folders / "vilt")
    read = []
    states = model.text_states
    monkeypatch.setattr(model, "text_states", lambda texts: read.extend(texts) or states(texts))
    reader = Reader(model, TEXTS)
    reader.states([0, 1])
    reader.states([1, 2, 0])
    assert sorted(read) == sorted(TEXTS[:3])


def test_pairs_of_a_teacher_that_only_scores(folders):
    model = teachers.load(folders / "vilt")
    pixels = list(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    pairs = torch.tensor([[0, 1], [2, 0], [2, 3]])

    class Plain:
        name, preprocess = "plain", model.preprocess

        def score(self, images, texts):
            return model.score(images, texts)

    ours = model.score_pairs(model.image_states(pixels), model.text_states(TEXTS), pairs)
    assert torch.allclose(score_pairs(Plain(), pixels, TEXTS, pairs), ours, atol=1e-6)
    with pytest.raises(ValueError, match="no pairs"):
        model.score(pixels, TEXTS)


def test_families_are_told_apart_by_their_folders(folders):
    assert families.find(folders / "blip") is families.Blip
    assert families.find(folders) is None
    assert isinstance(teachers.load(folders / "bridgetower-dual"), BridgeTowerDual)


def test_blip_embeds_where_an_encoder_is_asked_for(folders):
    assert isinstance(open_model(folders / "blip", "encoder"), BlipDual)
    with pytest.raises(ModelError, match="reads pairs"):
        open_model(folders / "vilt", "encoder")


def test_frozen_towers_stay_still_while_the_rest_learns(folders):
    model = teachers.load(folders / "blip").freeze_towers().train()
    assert model.training and not any(tower.training for tower in model.towers())
    assert model.towers_frozen
    parts = model.parameters_by_part()
    assert parts["total"] == parts["towers"] + parts["fusion"] == model.parameter_count()


def test_a_cut_leaves_the_teacher_as_it_is(folders):
    model = teachers.load(folders / "vilt")
    before, identity = model.depth, model.identity()
    student = model.cut()
    assert student.depth == before // 2 and student.source is None
    assert model.depth == before and model.identity() == identity
    assert student.towers_digest() == model.towers_digest()
    assert student.identity()["weights"] != identity["weights"]
    with pytest.raises(ConfigError, match="each once"):
        model.cut([])
