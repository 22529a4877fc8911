import copy
import json

import numpy as np
import pytest
import torch

from crosstill import fusion, students, teachers
from crosstill.errors import ConfigError, MismatchError, ModelError
from crosstill.fusion import lists
from crosstill.fusion.list_task import ListTask, tower_states
from crosstill.fusion.lists import Directions, ListStream, MatchedSplit
from crosstill.fusion.matcher import Matcher
from crosstill.fusion.states import Sides
from crosstill.objectives.dcd import variant_loss
from crosstill.students.student_config import FusionConfig
from crosstill.train import TrainConfig, checkpoint, step, train
from crosstill.train.distributed import Group
from crosstill.train.step import Outcome
from crosstill.types import States
from fusion.listed import SHAPE, meter_config, parameters, settings
from support import matrix, same, small_student

DCD = {"recipe": "dcd", "losses": {"dcd": {"hardest": 3}}}


@pytest.fixture(scope="module")
def towers(cached, tmp_path_factory):
    """A dual encoder's folder, whose towers fusion models stand on."""
    folder = tmp_path_factory.mktemp("towers") / "dual"
    small_student(cached).save(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(towers, tmp_path_factory):
    """A METER-shaped teacher's folder; its head is loud enough to tell candidates apart."""
    folder = tmp_path_factory.mktemp("teacher") / "meter"
    model = fusion.build(meter_config(towers, layers=4), seed=1)
    with torch.no_grad():
        for weight in parameters(model, "fusion"):
            weight.mul_(4)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def scored(teacher, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores") / "scores"
    return fusion.build_scores(teachers.load(teacher), scenes, folder, false=12, false_images=6)


@pytest.fixture(scope="module")
def unscored(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates") / "listed"
    return fusion.build_scores(None, scenes, folder, false=12, false_images=6)


@pytest.fixture
def half(teacher):
    return fusion.build("half", teacher=str(teacher))


def stream(cache, inputs, config, hardest=3, names=("image", "text")):
    split = cache.split("train")
    return ListStream(cache, split, inputs, Directions(names, hardest), config, Group())


def sides(cache, model, keep=True):
    return Sides(model, cache, cache.split("train"), keep)


def asked(batch, way, row):
    """The positions in the split that a list of the batch names."""
    found = batch.lists[way]
    return found.partners[row][found.valid[row]]


def test_the_hardest_of_the_scored_candidates_reach_the_student(scored, half):
    made = stream(scored, sides(scored, half), settings(**DCD))
    batch = made.batch(0, 1)
    rows = scored.split("train")
    for row, image in enumerate(batch.picked.images):
        told = scored.of_image(int(rows.images[image]))[1]
        best = np.sort(told)[::-1][:3]
        scores = batch.lists["image"].teacher[row]
        assert np.allclose(scores[1:], best)
        assert float(scores[0]) == scored.true_scores[rows.captions[batch.picked.captions[row]]]
        assert len(set(asked(batch, "image", row).tolist())) == 4
        assert set(scores[1:].tolist()) <= set(told.tolist())
    for row, caption in enumerate(batch.picked.captions):
        told = scored.of_caption(int(rows.captions[caption]))[1]
        assert np.allclose(batch.lists["text"].teacher[row][1:], np.sort(told)[::-1][:3])


def test_random_negatives_are_other_ones_and_drawn_limits_the_choice(scored, half):
    inputs = sides(scored, half)
    hard = stream(scored, inputs, settings(**DCD)).batch(0, 0)
    anyhow = stream(scored, inputs, settings(**DCD, negatives="random")).batch(0, 0)
    few = stream(scored, inputs, settings(**DCD, drawn=4)).batch(0, 0)
    means = [b.lists["image"].teacher[:, 1:].mean() for b in (hard, few, anyhow)]
    assert means[0] > means[1] > means[2]
    for batch in (hard, anyhow, few):
        scores = batch.lists["image"].teacher[:, 1:]
        assert (scores.diff(dim=1) <= 0).all()  # from hard to easy


def test_a_batch_is_a_pure_function_of_epoch_and_step(scored, half):
    inputs = sides(scored, half)
    config = settings(**DCD, negatives="random")
    one, two = (stream(scored, inputs, config) for _ in range(2))
    one.batch(1, 0)
    first, again = one.batch(0, 2), two.batch(0, 2)
    for way in ("image", "text"):
        assert same(first.lists[way].partners, again.lists[way].partners)
    assert same(first.images.hidden, again.images.hidden)
    assert not same(first.lists["image"].partners, one.batch(1, 2).lists["image"].partners)


def test_a_short_list_is_filled_up_and_marked(scored, half):
    made = stream(scored, sides(scored, half), settings(**DCD), hardest=40)
    found = made.batch(0, 0).lists["text"]
    assert found.valid[:, 0].all() and not found.valid.all()
    assert (found.valid.sum(1) < 41).all()


def task_of(model, cache, config) -> ListTask:
    task = ListTask(cache, config, Group())
    task.fit(model)
    task.start(model)
    return task


def take_step(task, model, batch) -> Outcome:
    optimizer = step.build_optimizer((model, task.losses), task.balance, task.config)
    outcome = task.backward(batch)
    optimizer.step()
    return outcome


def test_the_students_scores_are_those_of_its_pairs(scored, half):
    batch = stream(scored, sides(scored, half), settings(**DCD)).batch(0, 0)
    task = task_of(half.eval(), scored, settings(**DCD))
    said = task.rank(batch)
    entered = half.project(batch.images, "image"), half.project(batch.texts, "text")
    for way, own, other in (("image", 0, 1), ("text", 1, 0)):
        for row in (0, 5):
            pairs = torch.zeros(4, 2, dtype=torch.int64)
            pairs[:, own] = batch.pairs[own][row]
            pairs[:, other] = batch.lists[way].partners[row]
            expected = half.score_pairs(
                States(*(e.detach() for e in entered[0])),
                States(*(e.detach() for e in entered[1])),
                pairs,
            )
            assert torch.allclose(said.student[way][row], expected, atol=1e-5)


def test_the_loss_is_dcds_over_the_lists_and_only_fusion_learns(scored, half):
    config = settings(recipe="dcd", losses={"dcd": {"hardest": 3, "directions": "image"}})
    batch = stream(scored, sides(scored, half), config, names=("image",)).batch(0, 0)
    task = task_of(half.eval(), scored, config)
    said = task.rank(batch)
    expected = variant_loss(
        said.student["image"].detach(),
        said.teacher["image"],
        said.valid["image"],
        alpha=0.2,
    )
    before = copy.deepcopy(half.state_dict())
    outcome = take_step(task, half, batch)
    assert float(outcome.total) == pytest.approx(float(expected), rel=1e-5)
    changed = {name for name, value in half.state_dict().items() if not same(value, before[name])}
    assert changed and all(name.startswith("fusion") for name in changed)
    assert any("layers.0" in name for name in changed)


def test_only_a_dual_encoder_learns_a_scale(scored, half, towers, tmp_path):
    config = settings(recipe="dcd", losses={"dcd": {"hardest": 3, "calibrate": True}}, epochs=1)
    names = {}
    for kind, student in (("fusion", half), ("dual", students.load(towers))):
        train(student, scored, config, tmp_path / kind)
        state = checkpoint.load_latest(tmp_path / kind / "checkpoints")
        names[kind] = state["names"]["parameters"]
    assert [n for n in names["dual"] if n.startswith("losses")] == ["losses.dcd.log_scale"]
    assert not any(n.startswith("losses") for n in names["fusion"])


def test_kept_states_are_those_of_the_towers(scored, half):
    positions = np.array([7, 3, 30])
    kept, fresh = sides(scored, half), sides(scored, half, keep=False)
    assert kept.keeps and not fresh.keeps
    with torch.inference_mode():
        looked = half.encode_mixed(fresh.images(positions))
        read = half.encode_texts(fresh.texts(positions))
    assert torch.allclose(kept.images(positions).hidden, looked.hidden, atol=5e-3)
    assert same(kept.texts(positions).mask, read.mask)
    real = read.mask.bool()
    assert torch.allclose(kept.texts(positions).hidden[real], read.hidden[real], atol=5e-3)


def test_towers_can_learn_too(unscored, towers):
    model = fusion.build(meter_config(towers))
    config = settings(towers="train")
    made = task_of(model, unscored, config)
    batch = stream(unscored, sides(unscored, model), config).batch(0, 0)
    assert isinstance(tower_states(model, batch)[0], States)
    before = copy.deepcopy(model.state_dict())
    take_step(made, model, batch)
    changed = {name for name, value in model.state_dict().items() if not same(value, before[name])}
    assert any(name.startswith("image_tower") for name in changed)
    assert any(name.startswith("text_tower") for name in changed)


def test_a_judge_beside_the_student_finds_the_hardest_of_what_is_drawn(unscored, teacher, half):
    judge = teachers.load(teacher)
    config = settings(**DCD, teacher=str(teacher), drawn=20)
    batch = stream(unscored, sides(unscored, half), config).batch(0, 0)
    assert batch.lists["image"].partners.shape == (8, 21)
    half.eval()
    task = task_of(half, unscored, config)
    said = task.rank(batch)
    assert said.student["image"].shape == (8, 4)
    entered = judge.project(batch.images, "image"), judge.project(batch.texts, "text")
    found = batch.lists["image"]
    for row in range(8):
        pairs = torch.stack([batch.pairs[0][row].expand(21), found.partners[row]], dim=1)
        scores = judge.score_pairs(*(States(*(p.detach() for p in e)) for e in entered), pairs)
        hardest = scores[1:][found.valid[row, 1:]].sort(descending=True).values[:3]
        assert torch.allclose(said.teacher["image"][row, 0], scores[0], atol=1e-4)
        assert torch.allclose(said.teacher["image"][row, 1:], hardest, atol=1e-4)
    assert not any(p.grad is not None for p in judge.parameters())


def test_the_judges_own_student_gets_its_scores_and_no_distillation_error(scored, teacher):
    whole = teachers.load(teacher).cut([0, 1, 2, 3]).eval()
    batch = stream(scored, sides(scored, whole, keep=False), settings(**DCD)).batch(0, 0)
    said = task_of(whole, scored, settings(**DCD)).rank(batch)
    for way in ("image", "text"):
        real = said.valid[way]
        gap = (said.student[way] - said.teacher[way])[real].abs().max()
        assert gap.item() < 1e-4


RECIPES = ["dcd", "cprd", "info_nce"]


@pytest.mark.parametrize("recipe", matrix(RECIPES, ["cprd"]))
def test_a_fusion_student_learns_and_its_run_opens(scored, half, tmp_path, recipe):
    config = settings(recipe=recipe, losses={recipe: {"hardest": 3}}, epochs=4, lr=3e-3)
    run = train(half, scored, config, tmp_path / "run")
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    totals = [event["total"] for event in events if event["kind"] == "step"]
    assert len(totals) == 16 and np.mean(totals[-4:]) < np.mean(totals[:4])
    assert run.matcher.depth == 2
    assert run.metrics["teacher"]["rsum"] > 0
    with pytest.raises(ModelError):
        _ = run.best


FROZEN = [(recipe, freeze) for recipe in RECIPES for freeze in ("none", "image")]


@pytest.mark.parametrize(
    ("recipe", "freeze"), matrix(FROZEN, [("dcd", "none"), ("info_nce", "image")])
)
def test_a_dual_encoder_learns_from_scores(scored, cached, tmp_path, recipe, freeze):
    student = small_student(cached, dropout=0.0)
    config = settings(
        recipe=recipe, losses={recipe: {"hardest": 3}}, epochs=4, lr=3e-3, freeze=freeze
    )
    run = train(student, scored, config, tmp_path / "run")
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    totals = [event["total"] for event in events if event["kind"] == "step"]
    assert np.mean(totals[-4:]) < np.mean(totals[:4])
    assert run.best.dim == cached.dim


def test_a_loss_without_a_teacher_encodes_no_lists(scored, cached):
    task = task_of(small_student(cached), scored, settings())
    _, batch, _ = next(task.batches(0, 0))
    assert not batch.lists
    assert len(batch.texts.input_ids) == len(np.unique(batch.picked.captions))
    both = settings(losses={"info_nce": {"hardest": 3}, "dcd": {"hardest": 2}})
    _, batch, _ = next(task_of(small_student(cached), scored, both).batches(0, 0))
    assert batch.lists["image"].partners.shape == (8, 3)


def test_an_interrupted_run_ends_with_the_same_bits(scored, teacher, tmp_path, monkeypatch):
    config = settings(**DCD, save_every=1)
    make = lambda: fusion.build("half", teacher=str(teacher))  # noqa: E731
    whole = train(make(), scored, config, tmp_path / "whole")
    calls = iter(range(100))
    real = ListStream.batch

    def dying(self, epoch, step):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return real(self, epoch, step)

    monkeypatch.setattr(lists.ListStream, "batch", dying)
    with pytest.raises(KeyboardInterrupt):
        train(make(), scored, config, tmp_path / "cut")
    monkeypatch.undo()
    cut = train(None, scored, config, tmp_path / "cut", resume=True)
    assert same(whole.matcher.state_dict(), cut.matcher.state_dict())


def test_validation_ranks_among_the_listed_pairs(scored, teacher):
    model = teachers.load(teacher)
    val = scored.split("val")
    judged = MatchedSplit(scored, val, Sides(model, scored, val, keep=False))
    assert judged.recall(model).rsum == pytest.approx(judged.teacher_recall().rsum, abs=1e-6)
    assert judged.recall(model).images == 6


def test_what_does_not_fit_is_refused_in_one_line(
    scored, unscored, cached, teacher, half, tmp_path
):
    def refused(error, student, cache, config, *words):
        with pytest.raises(error) as caught:
            train(student, cache, config, tmp_path / "never")
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
        assert not (tmp_path / "never").exists()

    dual = small_student(cached)
    refused(MismatchError, half, cached, TrainConfig(), "fusion model", "score cache")
    refused(MismatchError, dual, scored, TrainConfig(), "score cache", "similarity", "dcd")
    refused(ConfigError, half, scored, settings(losses={"dcd": {"hardest": 13}}), "13", "--false")
    refused(ConfigError, half, scored, settings(**DCD, drawn=2), "drawn")
    refused(MismatchError, half, unscored, settings(**DCD), "without a teacher")
    refused(ConfigError, half, scored, settings(**DCD, freeze="image"), "towers")
    refused(ConfigError, dual, scored, settings(**DCD, teacher=str(teacher)), "fusion")
    refused(ConfigError, half, scored, settings(**DCD, chunk_size=4), "chunk_size")
    refused(ConfigError, half, scored, settings(**DCD, balance={"name": "gradnorm"}), "gradnorm")
    refused(ConfigError, dual, cached, TrainConfig(negatives="random"), "negatives", "score cache")
    refused(ConfigError, dual, cached, TrainConfig(fusion_lr=5), "fusion_lr", "score cache")
    refused(ConfigError, dual, scored, settings(**DCD, fusion_lr=5), "fusion_lr", "leave")
    beside = settings(**DCD, teacher=str(teacher), negatives="random")
    refused(ConfigError, half, scored, beside, "negatives", "teacher")
    refused(ConfigError, half, scored, settings(**DCD, negatives="batch"), "negatives", "scores")
    few = settings(losses={"info_nce": {"hardest": 8}}, negatives="batch")
    refused(ConfigError, half, scored, few, "hardest = 8", "batch_size")


def test_fusion_layers_learn_faster_than_the_head(scored, half, tmp_path):
    """AdamW's first step moves each weight by its learning rate, up or down."""
    before = copy.deepcopy(half.state_dict())
    config = settings(**DCD, epochs=1, steps_per_epoch=1, weight_decay=0.0, fusion_lr=5.0)
    after = train(half, scored, config, tmp_path / "run").matcher.state_dict()
    moves = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moves["fusion.rank_output.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moves["fusion.cross_modal_text_layers.0.intermediate.dense.weight"] == pytest.approx(
        5e-3, rel=1e-2
    )
    assert not any(move for name, move in moves.items() if "tower" in name)


def test_a_judge_on_other_towers_is_refused(unscored, cached, teacher, half, tmp_path):
    other = tmp_path / "other"
    small_student(cached).save(other / "dual")
    fusion.build(meter_config(other / "dual"), seed=5).cut([0]).save(other / "meter")
    model = fusion.build(meter_config(other / "dual"), seed=5)
    with torch.no_grad():
        next(model.text_tower.parameters()).add_(1)
    model.save(other / "moved")
    config = settings(**DCD, teacher=str(other / "moved"))
    with pytest.raises(MismatchError, match="towers are not the student's"):
        train(half, unscored, config, tmp_path / "run")


def test_the_batch_itself_can_be_the_lists_and_each_pair_runs_once(unscored, towers):
    config = settings(losses={"info_nce": {"hardest": 7}}, negatives="batch")
    model = fusion.build(meter_config(towers)).eval()
    batch = stream(unscored, sides(unscored, model), config, hardest=7).batch(0, 0)
    own = batch.picked.images
    for way, rows in (("image", batch.picked.captions), ("text", batch.picked.images)):
        found = batch.lists[way]
        assert found.partners.shape == (8, 8) and found.teacher is None
        distinct = np.unique(rows)
        for row in range(8):
            assert sorted(distinct[found.partners[row]]) == sorted(rows)
            same_image = (
                own[[list(rows).index(p) for p in distinct[found.partners[row]]]] == own[row]
            )
            assert found.valid[row, 0] and not found.valid[row, 1:][same_image[1:]].any()
    task, seen = task_of(model, unscored, config), []
    match = model.score_states
    model.score_states = lambda images, texts: seen.append(len(texts.mask)) or match(images, texts)
    task.rank(batch)
    assert seen == [len(np.unique(own)) * len(np.unique(batch.picked.captions))]


def test_a_meter_shaped_model_begins_in_the_joint_space(cached, tmp_path):
    """Its first tokens, transformed, are the dual encoder's embeddings along some directions."""
    dual = small_student(cached, dropout=0.0).eval()
    dual.save(tmp_path / "dual")
    model = fusion.build(meter_config(tmp_path / "dual", width=dual.dim, heads=2)).eval()
    pixels = torch.randint(0, 256, (3, 3, *dual.preprocess.size), dtype=torch.uint8)
    texts = ["a red circle", "two squares beside a star", "blue"]
    image, text = model.image_states(pixels).hidden[:, 0], model.text_states(texts).hidden[:, 0]
    types = model.fusion.token_type_embeddings.weight.detach()
    ours = torch.nn.functional.normalize(image - types[1], dim=1)
    theirs = torch.nn.functional.normalize(text - types[0], dim=1)
    cosines = dual.embed_images(pixels) @ dual.embed_texts(texts).T
    # the basis is orthonormal and as wide as the joint space, so cosines survive
    assert torch.allclose(ours @ theirs.T, cosines, atol=1e-5)
    anywhere = FusionConfig(
        fusion="meter", towers=str(tmp_path / "dual"), shape=SHAPE, start="random"
    )
    random = fusion.build(anywhere).fusion.cross_modal_image_transform.weight
    assert random.std() < 0.03


def test_layers_out_of_range_and_wrong_sources_are_refused(teacher, towers, tmp_path):
    for layers in ((0, 4), (-1,), (), (1, 1)):
        with pytest.raises(ConfigError, match="fusion layers 0 to 3"):
            fusion.build(FusionConfig(fusion="cut", layers=layers), teacher=str(teacher))
    with pytest.raises(ModelError, match=r"student|no fusion model"):
        fusion.build("half", teacher=str(towers))
    with pytest.raises(ConfigError, match="no teacher to cut"):
        fusion.build("half")
    with pytest.raises(ModelError, match="no dual encoder"):
        fusion.build(meter_config(teacher))
    with pytest.raises(ConfigError, match="heads"):
        fusion.build(meter_config(towers, heads=3))
    bad = tmp_path / "bad.toml"
    bad.write_text('fusion = "meter"\ntowers = "x"\nlayer = 3\n')
    with pytest.raises(ConfigError, match="layer"):
        students.load_config(bad)


def test_a_vilt_from_scratch_trains_and_reloads(unscored, tmp_path):
    config = FusionConfig(
        fusion="vilt",
        name="small-vilt",
        config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 16,
            "patch_size": 8,
        },
    )
    model = fusion.build(config, captions=unscored.texts)
    before = copy.deepcopy(model.state_dict())
    run = train(model, unscored, settings(towers="train"), tmp_path / "run")
    after = run.matcher.state_dict()
    moved = {name for name in after if not same(after[name], before[name])}
    assert any("word_embeddings" in name for name in moved)
    assert isinstance(run.matcher, Matcher) and run.matcher.depth == SHAPE["layers"]
