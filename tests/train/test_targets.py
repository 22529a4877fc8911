"""One target a teacher: each loss on each teacher's own rows, through a map that learns."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_distributed import launch
from torch.nn.functional import linear, normalize

from crosstill import objectives, students
from crosstill.cache import Cache, build, build_scores, join
from crosstill.errors import ConfigError, MismatchError
from crosstill.train import checkpoint, checks, optim, targets, train, warm, work
from crosstill.train import loop as module
from crosstill.train.distributed import Group
from crosstill.train.step import Step
from crosstill.types import Features
from support import SmallJudge, SmallTeacher, same, small_config, small_student
from verbs import TOML, crosstill, refusal

DIM, WIDE = 12, 24
SHARES = {"small": 0.8, "small-2": 0.2}


@pytest.fixture(scope="module")
def parts(scenes, tmp_path_factory) -> dict[str, Cache]:
    """What two teachers say, 16 and 24 wide."""
    folder = tmp_path_factory.mktemp("parts")
    made = SmallTeacher(), SmallTeacher(dim=WIDE, weights=3)
    return {
        name: build(teacher, scenes, folder / name, dtype="fp32")
        for name, teacher in zip(SHARES, made, strict=True)
    }


@pytest.fixture(scope="module")
def told(parts, tmp_path_factory) -> Cache:
    return join(list(parts.values()), tmp_path_factory.mktemp("joined") / "c", [1, 0.25])


@pytest.fixture
def each(settings):
    return settings.changed(["targets=each"])


def learner(cache, dim: int = DIM, dropout: float = 0.1):
    return students.build(small_config(dropout), dim=dim, captions=cache.texts)


def started(config, cache, student):
    """Losses, balancer, stream and step of a run that is about to begin."""
    losses, rule = checks.prepare(config, cache, Group())
    work.fit(student, cache, losses, config)
    stream, _ = work.data(student, cache, losses, config, Group())
    optimizer = optim.build((student, losses), rule, config)
    return losses, stream, Step(student, losses, rule, optimizer, config, Group())


def own_rows(part: Cache, stream, picked) -> Features:
    """A teacher's rows of a batch, from its own cache."""
    split = stream.split
    images, captions = split.images[picked.images], split.captions[picked.captions]
    return part.features(images, captions)


@pytest.mark.parametrize("unit", [True, False])
def test_a_step_is_the_weighted_sum_of_losses_computed_by_hand(told, parts, each, unit):
    options = {"contrastive": {"queue_size": 50}, "feature": {}, "kd": {}}
    changes = ["losses=contrastive+feature+kd+info_nce", "losses.contrastive.queue_size=50"]
    config = each.changed([*changes, "balance=fixed", f"normalise={str(unit).lower()}"])
    student = learner(told, dropout=0.0)
    losses, stream, step = started(config, told, student)
    batch = stream.batch(0, 0)
    seen = step._features(batch, slice(None))
    expected = {"info_nce": objectives.build("info_nce")(seen, None, batch.ids)}
    total = expected["info_nce"]
    for name, part in parts.items():
        weight = losses[f"kd@{name}"].target.map.detach()
        rows = [linear(side, weight) for side in seen]
        mine = Features(*(normalize(side, dim=1) if unit else side for side in rows))
        theirs = own_rows(part, stream, batch.picked)
        for kind, given in options.items():
            loss = objectives.build(kind, dim=part.dim, **given)
            expected[f"{kind}@{name}"] = value = loss(mine, theirs, batch.ids)
            total = total + SHARES[name] * value
    outcome = step(batch, 1e-3)
    assert outcome.losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outcome.losses[name], value.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outcome.total, total.detach(), rtol=1e-4, atol=1e-5)
    shares = {name: SHARES.get(name.partition("@")[2], 1.0) for name in expected}
    assert {n: w.item() for n, w in outcome.weights.items()} == pytest.approx(shares)


def test_two_teachers_that_are_one_count_as_one(parts, told, each, tmp_path):
    one = parts["small"]
    copy = shutil.copytree(one.folder, tmp_path / "copy")
    config = each.changed(["losses=feature+similarity", "balance=fixed"])
    totals = []
    for number in (1, 2):
        cache = join([one, copy][:number], tmp_path / str(number))
        _, stream, step = started(config, cache, learner(cache, dropout=0.0))
        totals.append(step(stream.batch(0, 0), 1e-3).total)
    torch.testing.assert_close(*totals)


def assert_turns(found: torch.Tensor) -> None:
    """A (D, d) with orthonormal columns, or rows where it has fewer."""
    whole = found.T @ found if len(found) >= found.shape[1] else found @ found.T
    torch.testing.assert_close(whole, torch.eye(len(whole)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", objectives.known())
def test_every_loss_learns_from_each_teacher(told, each, name):
    """A step of it: finite losses, and gradients that are finite and not 0, in every map too."""
    config = each.changed([f"losses={name}", "balance=fixed", "batch_size=8"])
    probe = objectives.build(name, dim=DIM, keys=torch.arange(3))
    if probe.reads.kind == "hidden":
        pytest.skip("reads the layers of one live teacher, see below")
    student = learner(told)
    losses, stream, step = started(config, told, student)
    outcome = step(stream.batch(0, 0), 1e-3)
    asked = [f"{name}@{teacher}" for teacher in SHARES] if probe.needs else [name]
    assert list(outcome.losses) == list(losses) == asked
    assert all(value.isfinite() for value in outcome.losses.values())
    learnt = {**dict(losses.named_parameters()), **dict(student.named_parameters())}
    assert sum(key.endswith("target.weight") for key in learnt) == (2 if probe.needs else 0)
    for key, parameter in learnt.items():
        # MFD reads no captions, and BERT's pooler is not read by a mean
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
        if key.endswith("target.weight"):
            assert parameter.grad.abs().sum() > 0, key


def test_layers_of_any_of_the_teachers_can_be_read(scenes, parts, each, tmp_path):
    teacher = small_student(build(None, scenes, tmp_path / "none"))
    teacher.save(tmp_path / "teacher")
    seen = build(teacher.load(tmp_path / "teacher"), scenes, tmp_path / "seen")
    cache = join([parts["small"], seen], tmp_path / "c")
    changes = ["losses=fitnets+feature", "balance=fixed", "epochs=1"]
    config = each.changed([*changes, f"teacher={tmp_path / 'teacher'}"])
    run = train(learner(cache), cache, config, tmp_path / "run")
    assert set(steps(run.folder)[0]["losses"]) == {"fitnets", "feature@small", "feature@small-2"}
    with pytest.raises(MismatchError, match="give --set teacher=small or "):
        train(learner(cache), cache, each.changed(changes), tmp_path / "other")


def steps(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def final(folder: Path) -> checkpoint.State:
    return checkpoint.load_latest(folder / "checkpoints")


def test_the_losses_fall_and_the_student_keeps_no_map(told, each, tmp_path):
    student = learner(told)
    run = train(student, told, each.changed(["epochs=6"]), tmp_path / "run")
    lines = steps(run.folder)
    for name in SHARES:
        values = [line["losses"][f"similarity@{name}"] for line in lines]
        assert sum(values[-10:]) < 0.9 * sum(values[:10])
        for kind in ("contrastive", "feature", "hard_negative"):
            assert f"{kind}@{name}" in lines[0]["weights"]
    assert run.best.dim == DIM
    assert run.best.state_dict().keys() == student.state_dict().keys()
    assert run.metrics["teacher"]["images"] == 6
    for name in SHARES:
        assert_turns(final(run.folder)["losses"][f"feature@{name}.target.weight"] / DIM**0.5)
    # the two teachers' queues hold what each of them said
    kept = final(run.folder)["losses"]
    for name, width in zip(SHARES, (16, WIDE), strict=True):
        queue = kept[f"contrastive@{name}.loss.queue.entries"]
        assert queue.shape == (2, 50, width)
        torch.testing.assert_close(queue.norm(dim=-1), torch.ones(2, 50))


class Interrupted(Exception):
    """What the tests raise where a machine would die."""


@pytest.fixture
def die_after(monkeypatch):
    call = Step.__call__

    def arm(count: int | None) -> None:
        left = count

        def step(self, batch, lr):
            nonlocal left
            if left is not None:
                left -= 1
                if left < 0:
                    raise Interrupted
            return call(self, batch, lr)

        monkeypatch.setattr(Step, "__call__", step)

    return arm


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (1, ()),
        (14, ()),
        (4, ("balance=uncertainty",)),
        (14, ("losses=crd+feature+info_nce", "balance=gradnorm", "chunk_size=7")),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    told, each, tmp_path, die_after, count, changes
):
    config = each.changed(changes)
    train(learner(told), told, config, tmp_path / "whole")
    die_after(count)
    with pytest.raises(Interrupted):
        train(module.Run(tmp_path / "whole").untrained, told, config, tmp_path / "cut")
    die_after(None)
    train(None, told, config, tmp_path / "cut", resume=True)
    assert same(final(tmp_path / "cut"), final(tmp_path / "whole"))
    for name in ("events.jsonl", "best.json", "metrics.json", "best/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resume_that_forgot_the_maps_would_be_seen(told, each, tmp_path, die_after, monkeypatch):
    train(learner(told), told, each, tmp_path / "whole")
    die_after(14)
    with pytest.raises(Interrupted):
        train(module.Run(tmp_path / "whole").untrained, told, each, tmp_path / "cut")
    die_after(None)
    restore = module.Session.restore

    def forgetful(self, state):
        mine = self.state()["losses"]
        maps = {key: value for key, value in mine.items() if key.endswith("target.weight")}
        restore(self, state | {"losses": state["losses"] | maps})

    monkeypatch.setattr(module.Session, "restore", forgetful)
    train(None, told, each, tmp_path / "cut", resume=True)
    assert not same(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_chunks_give_the_gradient_of_the_whole_batch(told, each):
    found = []
    for config in (each, each.changed(["chunk_size=7"])):
        student = learner(told, dropout=0.0)
        losses, stream, step = started(config, told, student)
        step(stream.batch(0, 0), 1e-3)
        learnt = {**dict(losses.named_parameters()), **dict(student.named_parameters())}
        found.append({k: p.grad for k, p in learnt.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    size = max(gradient.abs().max() for gradient in found[0].values()).item()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6 * size, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_do_what_one_does(told, tmp_path):
    one = launch(told, tmp_path / "one", 1, "targets=each")
    two = launch(told, tmp_path / "two", 2, "targets=each")
    assert one["position"] == two["position"]
    for key, value in one["losses"].items():
        if "queue" in key:
            assert torch.equal(two["losses"][key], value), key
        else:
            torch.testing.assert_close(two["losses"][key], value, atol=2e-5, rtol=1e-4)


def test_a_weight_of_a_loss_is_that_of_it_for_every_teacher(told, each):
    names = ["crd@small", "crd@small-2", "info_nce"]
    spread = targets.spread({"name": "fixed", "weights": {"crd": 0.8, "crd@small": 2}}, names)
    assert spread == {"name": "fixed", "weights": {"crd@small": 2, "crd@small-2": 0.8}}
    weighed = each.changed(["losses=crd+info_nce", "balance.name=fixed"])
    weighed = weighed.changed(["balance.weights.crd=0.5"])
    _, stream, step = started(weighed, told, learner(told))
    weights = step(stream.batch(0, 0), 1e-3).weights
    assert weights["crd@small"].item() == pytest.approx(0.5 * 0.8)
    with pytest.raises(ConfigError, match="no loss to weigh named 'kd'"):
        checks.prepare(weighed.changed(["balance.weights.kd=1"]), told, Group())


def test_the_width_is_the_students_own(told, each):
    config = small_config()
    assert work.make(config, told, each).dim == 256
    assert work.make(config.model_copy(update={"dim": DIM}), told, each).dim == DIM
    assert work.make(config, told, each.changed(["targets=joined"])).dim == 16 + WIDE


def test_a_joined_cache_trains_as_any_other(told, settings, tmp_path):
    run = train(small_student(told), told, settings.changed(["init_heads=ridge"]), tmp_path / "run")
    assert run.best.dim == told.dim
    with pytest.raises(MismatchError, match="width is 12 and the teacher's is 40"):
        train(learner(told), told, settings, tmp_path / "narrow")


@pytest.mark.parametrize("kind", ["features", "scores", "nothing"])
def test_other_caches_have_no_targets_to_choose_from(scenes, parts, each, tmp_path, kind):
    makers = {
        "features": lambda: parts["small"],
        "scores": lambda: build_scores(SmallJudge(), scenes, tmp_path / "scores"),
        "nothing": lambda: build(None, scenes, tmp_path / "nothing"),
    }
    cache = makers[kind]()
    with pytest.raises(MismatchError, match="targets = each: .* was not joined"):
        train(learner(cache), cache, each, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_verbs_take_a_joined_cache_and_refuse_in_one_line(parts, told, tmp_path):
    (tmp_path / "small.toml").write_text(TOML)
    usual = ["--student", tmp_path / "small.toml", "--set", "epochs=1", "--set", "batch_size=16"]
    usual += ["--set", "losses.contrastive.queue_size=16", "--out", tmp_path / "run"]
    each = ["--set", "targets=each", *usual]
    assert "was not joined" in refusal("train", parts["small"].folder, *each)
    assert "targets = 'both'" in refusal("train", told.folder, "--set", "targets=both", *usual)
    crosstill("train", told.folder, *each)
    rows = crosstill("evaluate", tmp_path / "run", "scenes:60", "--efficiency")
    assert "teacher (small + small)" in rows.stdout
    assert "the teacher's latency was not measured: small + small" in rows.stderr


@pytest.mark.parametrize("dim", [DIM, 16 + WIDE, 50])
def test_ridge_starts_at_the_principal_coordinates_of_the_joined_rows(told, each, dim):
    student = learner(told, dim, dropout=0.0)
    losses, stream, _ = started(each, told, student)
    plain = learner(told, 16 + WIDE, dropout=0.0)
    warm.ridge_heads(plain, told, stream.split)
    warm.ridge_heads(student, told, stream.split, targets.of(losses))
    basis = warm.principal(told, stream.split, dim).float()
    for side in ("image_head", "text_head"):
        found, whole = getattr(student, side).weight, getattr(plain, side).weight
        torch.testing.assert_close(found, basis.T @ whole, atol=1e-5, rtol=1e-4)
    for target in targets.of(losses):
        turn, own = target.map.detach(), basis[target.columns]
        assert_turns(turn)
        # the polar factor of a matrix is what leaves a symmetric, positive rest
        rest = turn.T @ own if len(turn) >= dim else own @ turn.T
        if dim <= 16 + WIDE:
            torch.testing.assert_close(rest, rest.T, atol=1e-5, rtol=0)
            assert torch.linalg.eigvalsh(rest).min() > -1e-5
        else:  # what no teacher's row fills is not dead
            assert turn[:, 40:].norm(dim=0).min() > 1e-3


def test_a_run_starts_ahead_with_ridge_heads_and_resumes(told, each, tmp_path, die_after):
    config = each.changed(["epochs=1", "lr=1e-12"])
    plain = train(learner(told), told, config, tmp_path / "plain")
    config = config.changed(["init_heads=ridge"])
    ahead = train(learner(told), told, config, tmp_path / "ahead")
    first = [steps(run.folder)[0]["losses"]["similarity@small"] for run in (plain, ahead)]
    assert first[1] < first[0]
    die_after(4)
    with pytest.raises(Interrupted):
        train(module.Run(tmp_path / "ahead").untrained, told, config, tmp_path / "cut")
    die_after(None)
    train(None, told, config, tmp_path / "cut", resume=True)
    assert same(final(tmp_path / "cut"), final(tmp_path / "ahead"))
