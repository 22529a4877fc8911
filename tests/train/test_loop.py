import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crosstill import evaluate
from crosstill.cache import build
from crosstill.errors import (
    ConfigError,
    InputError,
    LockedError,
    MismatchError,
    NonFiniteError,
)
from crosstill.files import locked
from crosstill.objectives import feature
from crosstill.train import TrainConfig, checkpoint, train
from crosstill.train import loop as module
from crosstill.train.batches import Sampler
from crosstill.train.task import PairTask
from support import SETTINGS, SmallTeacher, matrix, same, small_student

SHORT = ["epochs=1", "steps_per_epoch=2"]


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def test_a_run_learns_and_leaves_its_folder(cached, student, settings, tmp_path):
    longer = settings.changed(["epochs=6"])
    run = train(student, cached, longer, tmp_path / "run", command="crosstill train …")
    losses = [step["losses"]["similarity"] for step in events(run.folder, "step")]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:10])
    epochs = events(run.folder, "epoch")
    best = max(range(6), key=lambda e: epochs[e]["val"]["rsum"])
    assert run.metrics["best"]["epoch"] == best + 1
    assert run.metrics["best"]["val"] == epochs[best]["val"]
    assert run.metrics["teacher"]["images"] == 6
    assert run.config["command"] == "crosstill train …"
    recall = evaluate.CachedSplit(cached, cached.split("val"), run.best).recall(run.best)
    assert recall.to_json() == run.metrics["best"]["val"]


def final(folder: Path) -> checkpoint.State:
    return checkpoint.load_latest(folder / "checkpoints")


class Interrupted(Exception):
    """What the tests raise where a machine would die."""


@pytest.fixture
def die_after(monkeypatch):
    """Make the training step raise once so many steps were taken."""
    backward = PairTask.backward

    def arm(steps: int | None) -> None:
        taken = 0

        def step(self, batch):
            nonlocal taken
            if steps is not None and taken >= steps:
                raise Interrupted
            taken += 1
            return backward(self, batch)

        monkeypatch.setattr(PairTask, "backward", step)

    return arm


@pytest.fixture(scope="module")
def whole_run(cached, tmp_path_factory):
    """Makes the run of these changes that nothing interrupted, once; read it, never write to it."""
    places: dict[tuple[str, ...], Path] = {}

    def make(*changes: str) -> Path:
        if changes not in places:
            places[changes] = tmp_path_factory.mktemp("whole") / "run"
            config = TrainConfig(**SETTINGS).changed(changes)
            train(small_student(cached), cached, config, places[changes])
        return places[changes]

    return make


INTERRUPTED = list(itertools.product(["dsmd", "uncertainty"], [1, 3, 4, 10, 13, 19]))


@pytest.mark.parametrize(("balance", "steps"), matrix(INTERRUPTED, [("dsmd", 13)]))
def test_an_interrupted_run_resumes_to_the_same_bits(
    cached, settings, whole_run, tmp_path, die_after, steps, balance
):
    changes = [] if balance == "dsmd" else [f"balance={balance}"]
    config, whole = settings.changed(changes), whole_run(*changes)
    die_after(steps)
    with pytest.raises(Interrupted):
        train(module.Run(whole).untrained, cached, config, tmp_path / "cut")
    die_after(None)
    train(None, cached, config, tmp_path / "cut", resume=True)
    assert same(final(tmp_path / "cut"), final(whole))
    assert load_file(tmp_path / "cut/best/model.safetensors").keys()
    for name in ("events.jsonl", "best.json", "metrics.json", "best/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()


def _replace(monkeypatch, loss) -> None:
    """Make a class the loss that `objectives/feature.py` defines."""
    monkeypatch.setattr(loss, "__module__", feature.__name__)
    monkeypatch.setattr(feature, "FeatureDistillation", loss)


class Drawing(feature.FeatureDistillation):
    """A loss that draws from every generator, as a stranger's might."""

    def forward(self, student, teacher, ids):
        noise = random.random() + np.random.rand() + torch.rand(())
        return super().forward(student, teacher, ids) * (1 + noise)


@pytest.fixture(scope="module")
def drawing_runs(cached, tmp_path_factory):
    """Makes a run with that loss, whole and interrupted, once for each learning rate."""
    places: dict[float, Path] = {}

    def make(lr: float) -> Path:
        if lr not in places:
            place = places[lr] = tmp_path_factory.mktemp("drawing")
            config = TrainConfig(**SETTINGS | {"lr": lr})
            backward, steps = PairTask.backward, iter(range(14))

            def die(self, batch):
                if next(steps, None) is None:
                    raise Interrupted
                return backward(self, batch)

            with pytest.MonkeyPatch.context() as patch:
                _replace(patch, Drawing)
                train(small_student(cached), cached, config, place / "whole")
                patch.setattr(PairTask, "backward", die)
                with pytest.raises(Interrupted):
                    train(module.Run(place / "whole").untrained, cached, config, place / "cut")
        return places[lr]

    return make


@pytest.mark.parametrize(
    "piece",
    [
        "student",
        "optimizer",
        "losses",
        "balance",
        "position",
        "best",
        "rng_torch",
        "rng_numpy",
        "rng_python",
    ],
)
def test_each_piece_of_state_matters(cached, settings, drawing_runs, tmp_path, monkeypatch, piece):
    """Leave one piece out of a resume: the comparison above must notice every one."""
    if piece == "best":  # it matters to runs whose best epoch lies behind them
        settings = settings.changed(["lr=1e-12"])
    made = drawing_runs(settings.lr)
    shutil.copytree(made / "cut", tmp_path / "cut")
    _replace(monkeypatch, Drawing)
    restore = module.Session.restore

    def forgetful(self, state):
        restore(self, state | {piece: self.state()[piece]})

    monkeypatch.setattr(module.Session, "restore", forgetful)
    train(None, cached, settings, tmp_path / "cut", resume=True)
    assert not same(final(tmp_path / "cut"), final(made / "whole"))


def test_chunks_give_the_gradient_of_the_whole_batch(cached, settings, tmp_path):
    """Without dropout, whose masks the two ways draw in different shapes."""
    steady = settings.changed(["epochs=1", "clip_norm=1.0"])
    train(small_student(cached, dropout=0.0), cached, steady, tmp_path / "whole")
    chunks = steady.changed(["chunk_size=7"])
    train(small_student(cached, dropout=0.0), cached, chunks, tmp_path / "chunks")
    a, b = final(tmp_path / "whole")["student"], final(tmp_path / "chunks")["student"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)


def test_a_run_without_dropout_is_that_of_towers_that_have_none(cached, settings, tmp_path):
    off = settings.changed([*SHORT, "dropout=false"])
    train(small_student(cached), cached, off, tmp_path / "off")
    train(small_student(cached, dropout=0.0), cached, settings.changed(SHORT), tmp_path / "none")
    train(small_student(cached), cached, settings.changed(SHORT), tmp_path / "on")
    off, none, on = (final(tmp_path / name)["student"] for name in ("off", "none", "on"))
    for name in none:  # passes differ in size, so the last bits do
        torch.testing.assert_close(off[name], none[name], atol=2e-5, rtol=1e-4)
    assert any(
        (off[name] - on[name]).abs().max() > 1e-3 for name in on if on[name].is_floating_point()
    )


def test_chunks_replay_their_dropout(cached, settings, tmp_path):
    """The graph of a chunk must belong to the very embeddings that the loss saw."""
    config = settings.changed(["epochs=1", "chunk_size=7"])
    seen: list[torch.Tensor] = []
    features = PairTask._features

    def note(self, batch, rows):
        found = features(self, batch, rows)
        seen.append(found.text.detach().clone())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTask, "_features", note)
        train(small_student(cached), cached, config, tmp_path / "run")
    first, again = seen[:4], seen[4:8]  # 24 pairs are four chunks of at most seven
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_heads_learn_alone(cached, student, settings, tmp_path):
    before = {k: v.clone() for k, v in student.state_dict().items()}
    train(student, cached, settings.changed(["freeze=both", *SHORT]), tmp_path / "run")
    after = final(tmp_path / "run")["student"]
    changed = {k.partition(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"image_head", "text_head"}


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_stays_and_its_head_learns(cached, student, settings, tmp_path, side):
    frozen = settings.changed([f"freeze={side}", *SHORT])
    before = {k: v.clone() for k, v in student.state_dict().items()}
    train(student, cached, frozen, tmp_path / "run")
    after = final(tmp_path / "run")["student"]
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith(f"{side}_tower"))
    assert not torch.equal(before[f"{side}_head.weight"], after[f"{side}_head.weight"])
    other = "text" if side == "image" else "image"
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(f"{other}_t"))


def test_a_run_without_a_teacher(scenes, student, settings, tmp_path):
    captions = build(None, scenes, tmp_path / "captions")
    config = settings.changed(["losses=info_nce", "balance=fixed", *SHORT])
    run = train(student, captions, config, tmp_path / "run")
    assert run.metrics["teacher"] is None


def test_losses_that_read_what_the_teacher_did_not_leave_refuse_by_name(
    scenes, student, settings, tmp_path
):
    class ImagesOnly(SmallTeacher):
        modalities = frozenset({"image"})

    cache = build(ImagesOnly(), scenes, tmp_path / "c")
    lacking = "no text features .* contrastive, feature, similarity, hard_negative need; use --rec"
    with pytest.raises(MismatchError, match=lacking):
        train(student, cache, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # what the message says to do
    advice = ["losses=info_nce", 'losses.instance.side="image"', "balance=fixed", *SHORT]
    run = train(student, cache, settings.changed(advice), tmp_path / "run")
    assert events(run.folder, "step")[0]["losses"].keys() == {"info_nce", "instance"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("balance=dsdm", "no balancer named 'dsdm'; did you mean 'dsmd'"),
        ("balance.temprature=2", "temprature"),
        ("losses=featur", "no loss named 'featur'; did you mean 'feature'"),
        ("batch_size=1000", "batch_size=240"),
        ("val_split=dev", "split 'dev' has no images"),
    ],
)
def test_wrong_settings_are_refused_before_a_folder_is_made(
    cached, student, settings, tmp_path, change, message
):
    with pytest.raises(InputError, match=message):
        train(student, cached, settings.changed([change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cache_without_a_teacher_refuses_losses_and_ridge_by_name(
    scenes, student, settings, tmp_path
):
    captions = build(None, scenes, tmp_path / "captions")
    with pytest.raises(MismatchError, match="no image and text features.* use --recipe info_nce"):
        train(student, captions, settings, tmp_path / "run")
    config = settings.changed(["losses=info_nce", "init_heads=ridge"])
    with pytest.raises(MismatchError, match="init_heads=random"):
        train(student, captions, config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(
    cached, student, settings, tmp_path, monkeypatch
):
    class Breaks(feature.FeatureDistillation):
        calls = 0

        def forward(self, student, teacher, ids):
            Breaks.calls += 1
            return super().forward(student, teacher, ids) * (float("nan") if ids[0] == bad else 1)

    order = Sampler(cached.split("train"), 24, 1, settings.seed)
    split = cached.split("train")
    bad = int(cached.keys[split.images[order.pick(0, 4).images[0]]])
    _replace(monkeypatch, Breaks)
    with pytest.raises(NonFiniteError, match="loss 'feature' became nan at step 4.*resume"):
        train(student, cached, settings, tmp_path / "run")
    record = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert record["image_ids"] == [
        cached.image_ids[r] for r in split.images[order.pick(0, 4).images]
    ]
    assert len(record["captions"]) == 24
    Breaks.calls = 0
    with pytest.raises(NonFiniteError, match="at step 4"):
        train(None, cached, settings, tmp_path / "run", resume=True)
    assert Breaks.calls == 1


def test_a_run_folder_is_not_shared_and_not_overwritten(cached, student, settings, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(LockedError, match="in use by process"):
        train(student, cached, settings, tmp_path / "run")
    with pytest.raises(InputError, match="no run to resume"):
        train(None, cached, settings, tmp_path / "run", resume=True)
    train(student, cached, settings.changed(SHORT), tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run; give --resume"):
        train(student, cached, settings, tmp_path / "run")
    with pytest.raises(ConfigError, match="started with epochs = 1"):
        train(None, cached, settings, tmp_path / "run", resume=True)


def test_a_folder_that_holds_something_else_is_left_alone(cached, student, settings, tmp_path):
    (tmp_path / "thesis/best").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds best and no run; give another --out"):
        train(student, cached, settings, tmp_path / "thesis")
    assert (tmp_path / "thesis/best").is_dir()


def test_what_a_kill_leaves_of_a_beginning_is_cleared(cached, student, settings, tmp_path):
    for name in (".writing-1-probe", ".starting", "student/half"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    train(student, cached, settings.changed(SHORT), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.writing-1-probe").touch()
    again = module.Run(tmp_path / "run").untrained
    train(again, cached, settings.changed(SHORT), tmp_path / "other")


def test_a_run_does_not_go_on_with_another_cache(cached, scenes, student, settings, tmp_path):
    train(student, cached, settings.changed(SHORT), tmp_path / "run")
    other = build(SmallTeacher(weights=5), scenes, tmp_path / "other")
    with pytest.raises(MismatchError, match="another cache"):
        train(None, other, settings.changed(SHORT), tmp_path / "run", resume=True)


def test_a_width_that_does_not_fit_is_refused(scenes, student, settings, tmp_path):
    wide = build(SmallTeacher(dim=20), scenes, tmp_path / "c")
    with pytest.raises(MismatchError, match="width is 16 and the teacher's is 20"):
        train(student, wide, settings, tmp_path / "run")


def test_bf16_is_refused_where_it_would_crawl(cached, student, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": False})
    with pytest.raises(ConfigError, match="precision=fp32"):
        train(student, cached, settings.changed(["precision=bf16"]), tmp_path / "run")


def test_bf16_trains(cached, student, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    short = settings.changed(["precision=bf16", *SHORT])
    run = train(student, cached, short, tmp_path / "run")
    assert run.metrics["steps"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_student_trains_to_nearly_the_same(cached, student, settings, tmp_path):
    short = settings.changed(["epochs=1"])
    train(student, cached, short, tmp_path / "plain")
    again = module.Run(tmp_path / "plain").untrained
    train(again, cached, short.changed(["compile=true"]), tmp_path / "compiled")
    plain, fused = (events(tmp_path / n, "step")[0]["losses"] for n in ("plain", "compiled"))
    assert fused == pytest.approx(plain, rel=0.2)


def test_ctrl_c_saves_and_a_resumed_run_ends_the_same(cached, settings, whole_run, tmp_path):
    backward, whole = PairTask.backward, whole_run()

    def interrupt(self, batch):
        outcome = backward(self, batch)
        if not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairTask, "backward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(module.Run(whole).untrained, cached, settings, tmp_path / "cut")
    assert final(tmp_path / "cut")["position"] == {"epoch": 0, "step": 1, "total": 1}
    train(None, cached, settings, tmp_path / "cut", resume=True)
    assert same(final(tmp_path / "cut"), final(whole))


def test_tensorboard_gets_the_same_curves(cached, student, settings, tmp_path):
    pytest.importorskip("tensorboard")
    train(student, cached, settings.changed(SHORT), tmp_path / "run")
    assert list((tmp_path / "run/tensorboard").glob("events.out.*"))
