"""Exact resume, through the command line: settings then come from the run's folder."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crosstill import balance, fusion, recipes, teachers
from crosstill.cache import Cache, build, join
from crosstill.files import sealed
from crosstill.fusion.scores import build_scores
from crosstill.train import checkpoint
from fusion.listed import meter_config, parameters
from support import SmallTeacher, matrix, mixed_cache, same, small_student
from verbs import TOML, crosstill, refusal

Killed = Callable[..., tuple[Path, Path]]

SETTINGS = [
    "epochs=2",
    "steps_per_epoch=4",
    "batch_size=16",
    "lr=1e-3",
    "log_every=1",
    "save_every=3",
]


@pytest.fixture(scope="module")
def home(cached, scenes, tmp_path_factory) -> Path:
    """Caches of every kind, and what students are made of."""
    home = tmp_path_factory.mktemp("resume")
    shutil.copytree(cached.folder, home / "features")
    (home / "small.toml").write_text(TOML)
    wide = build(SmallTeacher(dim=24, weights=1), scenes, home / "wide")
    join([cached, wide], home / "joined", [3, 1])
    build(None, scenes, home / "none")
    small_student(cached).save(home / "dual")
    meter = fusion.build(meter_config(home / "dual", layers=4), seed=1)
    with torch.no_grad():
        for weight in parameters(meter, "fusion"):
            weight.mul_(4)  # a head that is loud enough to tell candidates apart
    meter.save(home / "meter")
    build_scores(teachers.load(home / "meter"), scenes, home / "scores", false=12, false_images=6)
    return home


def words(home: Path, cache: str, recipe: str, *changes: str, student: str = "") -> list[str]:
    """What is typed after `crosstill train`."""
    chosen = ["--student", student or str(home / "small.toml"), "--recipe", recipe]
    queue = ["losses.contrastive.queue_size=50"] if recipe in ("flickr30k", "coco") else []
    every = [*SETTINGS, *queue, *changes]
    return [str(home / cache), *chosen, *(word for change in every for word in ("--set", change))]


def content(run: Path) -> dict[str, object]:
    """Every file of a run but its lock; of config.json all but where and how it was started."""
    held: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock" and "tensorboard" not in path.parts
    }
    record = json.loads((run / "config.json").read_text())
    return held | {"config.json": {k: record[k] for k in record if k not in ("command", "sha256")}}


def check_equal(run: Path, whole: Path) -> None:
    ours, theirs = content(run), content(whole)
    assert ours.keys() == theirs.keys(), run
    assert [name for name in ours if ours[name] != theirs[name]] == [], run


class Runs:
    """Runs that a process forks off, so that only it pays for the imports."""

    def __init__(self, process: subprocess.Popen[str], place: Path) -> None:
        self._process, self._place = process, place
        self._whole: dict[tuple[str, ...], Path] = {}

    def carry_out(self, cases: list[dict]) -> list[dict]:
        """Start, kill and resume each case's run."""
        outcomes = []
        for case in cases:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            assert line, "the process of the runs has ended"
            outcomes.append(json.loads(line))
            assert outcomes[-1]["code"] == 0, Path(case["out"] + ".log").read_text()
        return outcomes

    def whole(self, typed: list[str]) -> Path:
        """The run that was never killed; read it, never write to it."""
        if (*typed,) not in self._whole:
            out = self._place / f"whole-{len(self._whole)}"
            self.carry_out([{"words": typed, "out": str(out), "deaths": []}])
            self._whole[(*typed,)] = out
        return self._whole[(*typed,)]

    def check(
        self, typed: list[str], deaths: list[list[dict]], tmp_path: Path, least: float = 1.0
    ) -> None:
        """Check that runs that died each of these ways end as the whole one, file for file.

        At `least` this share of the deaths has to strike before the run is over.
        """
        cases = [
            {"words": typed, "out": str(tmp_path / f"run-{number}"), "deaths": each}
            for number, each in enumerate(deaths)
        ]
        struck: list[bool] = []
        for outcome in self.carry_out(cases):
            check_equal(Path(outcome["out"]), self.whole(typed))
            struck += outcome["struck"]
        assert sum(struck) >= least * len(struck)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    command = [sys.executable, str(Path(__file__).with_name("commanded_runs.py"))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield Runs(process, tmp_path_factory.mktemp("runs"))


# after the first checkpoint; before it; twice, in a validation and in the second epoch
LATE, EARLY, TWICE = [{"step": 6}], [{"step": 2}], [{"validate": 1}, {"step": 3}]


# runs of other caches, students and balancers are resumed in tests/golden too
FEATURES = [recipe for recipe in recipes.RECIPES if recipe != "dcd_released"]
RESUMED = list(itertools.product(FEATURES, [LATE, TWICE]))


@pytest.mark.parametrize(("recipe", "deaths"), matrix(RESUMED, [("dsmd", TWICE)]))
def test_every_recipe(home, runs, tmp_path, recipe, deaths):
    runs.check(words(home, "features", recipe), [deaths], tmp_path)


@pytest.mark.parametrize("rule", matrix(balance.known(), []))
def test_every_balancer(home, runs, tmp_path, rule):
    typed = words(home, "features", "dsmd", f"balance={rule}")
    runs.check(typed, [LATE], tmp_path)


HEADS = ["init_heads=ridge", "freeze=text", "chunk_size=5", "captions_per_image=2"]
MIXED = ["losses.kd={}", "chunk_size=5", "paired_share=0.25", "losses.contrastive.queue_size=50"]
KINDS = [
    ("mixed", "dsmd", [*MIXED, "losses.info_nce={}"]),
    ("unpaired", "dsmd", ["losses.kd={}", "losses.contrastive.queue_size=50"]),
    ("joined", "dsmd", ["balance=uncertainty"]),
    ("joined", "kd", ["init_heads=ridge"]),
    ("none", "info_nce", []),
    ("scores", "dcd", ["losses.dcd.hardest=3"]),
    ("scores", "cprd", ["losses.cprd.hardest=3", "drawn=8"]),
    ("views", "dsmd", HEADS),
]


KILLED = [(*kind, deaths) for kind in KINDS for deaths in (LATE, EARLY)]


@pytest.mark.parametrize(
    ("cache", "recipe", "changes", "deaths"), matrix(KILLED, [KILLED[0], KILLED[2], KILLED[-1]])
)
def test_every_kind_of_cache(home, runs, scenes, tmp_path, cache, recipe, changes, deaths):
    if cache == "views":
        build(SmallTeacher(), scenes, home / "views", views=3)
    if cache in ("mixed", "unpaired") and not (home / cache).exists():
        mixed_cache(scenes, home / cache, every=3 if cache == "mixed" else 0)
    runs.check(words(home, cache, recipe, *changes), [deaths], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["half", "meter"])
def test_fusion_students(home, runs, tmp_path, student):
    if student == "meter":
        shape = "layers = 2\nwidth = 16\nheads = 2\nmlp = 16\ndropout = 0.1\n"
        text = f'fusion = "meter"\nname = "meter"\ntowers = "{home / "dual"}"\n[shape]\n{shape}'
        (home / "meter.toml").write_text(text)
        student = str(home / "meter.toml")
    changes = ["losses.dcd.hardest=3", "batch_size=8"]
    typed = words(home, "scores", "dcd", *changes, student=student)
    runs.check(typed, [LATE, EARLY], tmp_path)


@pytest.mark.parametrize("name", matrix(["SIGTERM", "SIGINT"], ["SIGTERM"]))
def test_asked_to_stop(home, runs, tmp_path, name):
    deaths = [[{"signal": name, "step": step} for step in (2, 4)]]
    runs.check(words(home, "features", "dsmd"), deaths, tmp_path)


# few of what the slow tests below do at every moment
@pytest.mark.parametrize(
    "deaths",
    matrix(
        [[{"at": 40}], [{"at": 110}], [{"at": 180}], [{"size": 9000}], [{"size": 60_000}]],
        [[{"size": 9000}]],
    ),
)
def test_a_few_moments_inside_writes(home, runs, tmp_path, deaths):
    runs.check(words(home, "features", "dsmd"), [deaths], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_moment_inside_writes(home, runs, tmp_path, part):
    """Killed at each moment of one whole run, and within the writes of files of many sizes."""
    typed = words(home, "features", "dsmd")
    (whole,) = runs.carry_out([{"words": typed, "out": str(tmp_path / "w"), "deaths": []}])
    assert whole["moments"] > 100
    moments, sizes = range(1 + part, whole["moments"] + 1, 4), range(500 + part * 250, 60_000, 4000)
    deaths = [[{"at": n}] for n in moments] + [[{"size": n}] for n in sizes]
    runs.check(typed, deaths, tmp_path, least=0.95)


@pytest.mark.slow
def test_fifty_kills_at_random_times(home, runs, tmp_path):
    """Ten runs that are each killed five times, at whatever they are doing."""
    typed, draw = words(home, "features", "dsmd", "epochs=4"), random.Random(0)
    whole = {"words": typed, "out": str(tmp_path / "dsmd-0"), "deaths": []}
    (outcome,) = runs.carry_out([whole])
    each = outcome["seconds"] / 3
    cases = [
        {
            "words": typed,
            "out": str(tmp_path / f"dsmd-{run}"),
            "deaths": [{"after": draw.uniform(0, each)} for _ in range(5)],
        }
        for run in range(1, 11)
    ]
    struck = 0
    for outcome in runs.carry_out(cases):
        check_equal(Path(outcome["out"]), tmp_path / "dsmd-0")
        struck += sum(outcome["struck"])
    assert struck >= 30, "too few kills struck before the end"


# --- what a run keeps, and runs of before ---


def make_old(run: Path, monkeypatch: pytest.MonkeyPatch, command: str | None = None) -> None:
    """Take from a run what crosstill did not keep before: the losses' order, and all names."""
    record = json.loads((run / "config.json").read_text())
    del record["losses"]
    record |= {"format": 1} | ({} if command is None else {"command": command})
    (run / "config.json").write_text(json.dumps(sealed(record), sort_keys=True))
    states = [checkpoint.load(path) for path in sorted(run.glob("checkpoints/*.json"))]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 1)
        for state in states:
            del state["names"]
            checkpoint.save(run / "checkpoints", state["position"]["total"], state, keep=9)


@pytest.fixture(scope="module")
def made(home, runs, tmp_path_factory) -> Killed:
    """Makes a run that was killed before its sixth step, and one that was not, once for all."""
    places: dict[tuple[str, ...], Path] = {}

    def make(recipe: str, *changes: str) -> tuple[Path, Path]:
        typed = words(home, "features", recipe, *changes)
        if (*typed,) not in places:
            cut = tmp_path_factory.mktemp("killed") / "cut"
            death = {"words": typed, "out": str(cut), "deaths": LATE, "finish": False}
            runs.carry_out([death])
            places[(*typed,)] = cut
        return places[(*typed,)], runs.whole(typed)

    return make


@pytest.fixture
def killed(made, tmp_path) -> Killed:
    """Copies of those runs, the one that was not killed to read only."""

    def copied(recipe: str, *changes: str) -> tuple[Path, Path]:
        cut, whole = made(recipe, *changes)
        return Path(shutil.copytree(cut, tmp_path / "cut")), whole

    return copied


def check_goes_on(home: Path, cut: Path, whole: Path) -> None:
    """Equal in all but the formats of what was written before, and the names in checkpoints."""
    crosstill("train", home / "features", "--out", cut, "--resume")
    for name in ("events.jsonl", "metrics.json", "best/model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert same(state_of(cut), state_of(whole))


def state_of(run: Path) -> dict[str, object]:
    """The newest state of a run, without what tells which run it is of."""
    state = checkpoint.load_latest(run / "checkpoints")
    return {**state, "names": {k: v for k, v in state["names"].items() if k != "run"}}


# what runs of before did by default
BEFORE = {
    "dsmd": (
        "center=false",
        "losses.hard_negative.margin=0",
        "losses.contrastive.queue_size=64",
    ),
    "kd": ("center=false",),
}
ORDERED = [
    ("dsmd", []),
    ("dsmd", ["losses.info_nce.temperature=0.1", "losses.kd.temperature=2.0"]),
    ("kd", ["losses=similarity+info_nce+feature", "balance=dwa"]),
]


@pytest.mark.parametrize(("recipe", "changes"), matrix(ORDERED, ORDERED[-1:]))
def test_a_run_of_before_goes_on_in_the_order_of_its_command(
    home, killed, monkeypatch, recipe, changes
):
    cut, whole = killed(recipe, *BEFORE[recipe], *changes)
    make_old(cut, monkeypatch)
    check_goes_on(home, cut, whole)


@pytest.mark.parametrize("changes", matrix([[], ["losses.kd.temperature=2.0"]], [[]]))
def test_a_run_of_before_from_python_goes_on_in_its_recipes_order(
    home, killed, monkeypatch, changes
):
    cut, whole = killed("dsmd", *BEFORE["dsmd"], *changes)
    make_old(cut, monkeypatch, command="")
    check_goes_on(home, cut, whole)


def test_a_run_of_before_whose_order_is_lost_is_refused(home, killed, monkeypatch):
    added = ("losses.kd.temperature=2.0", "losses.info_nce.temperature=0.1")
    cut, whole = killed("dsmd", *BEFORE["dsmd"], *added)
    make_old(cut, monkeypatch, command="")
    held = content(cut)
    error = refusal("train", home / "features", "--out", cut, "--resume")
    assert "did not keep the order of contrastive, feature, hard_negative, info_nce, kd" in error
    assert content(cut) == held
    # from Python, whoever started it says the order
    settings = recipes.resumed(whole)
    recipes.distill(None, Cache(home / "features"), settings, out=cut, resume=True)
    assert (cut / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


def test_other_names_are_refused(home, killed):
    cut, _ = killed("dsmd")
    newest = max(cut.glob("checkpoints/*.json"))
    state = checkpoint.load(newest)
    for kind in ("losses", "parameters"):
        names = {**state["names"], kind: state["names"][kind][::-1]}
        checkpoint.save(newest.parent, state["position"]["total"], {**state, "names": names}, 2)
        error = refusal("train", home / "features", "--out", cut, "--resume")
        assert f"saved for the {kind} " in error and "start it anew" in error


def test_damage_costs_no_whole_checkpoint(home, killed):
    """What is damaged, and what only looks like a checkpoint, goes; what is whole stays."""
    cut, whole = killed("dsmd", "save_every=2")
    _, newest = sorted(cut.glob("checkpoints/*.json"))
    flip = bytearray(newest.with_suffix(".safetensors").read_bytes())
    flip[-1] ^= 1
    newest.with_suffix(".safetensors").write_bytes(flip)
    for name in ("step-000000099.json", "step-abc.json"):
        (newest.parent / name).write_text("{}")
    (cut / "checkpoints/step-000000098.json").mkdir()
    with (cut / "events.jsonl").open("ab") as file:
        file.write(b"\xff\x00junk\n")
    crosstill("train", home / "features", "--out", cut, "--resume")
    shutil.rmtree(cut / "checkpoints/step-000000098.json")
    (cut / "checkpoints/step-abc.json").unlink()
    check_equal(cut, whole)


def test_a_refused_resume_changes_nothing(home, killed):
    cut, _ = killed("dsmd", "save_every=2")
    for path in cut.glob("checkpoints/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    held = content(cut)
    result = crosstill("train", home / "features", "--out", cut, "--resume", code=1)
    assert "every checkpoint is damaged; start the run anew" in result.stderr
    assert content(cut) == held


def test_a_checkpoint_of_another_run_is_refused(home, killed, made):
    cut, _ = killed("dsmd")
    other, _ = made("dsmd", "save_every=2")
    shutil.rmtree(cut / "checkpoints")
    shutil.copytree(other / "checkpoints", cut / "checkpoints")
    error = refusal("train", home / "features", "--out", cut, "--resume")
    assert "of a run with other settings, another cache or another live teacher" in error


def test_other_threads_are_said(home, killed, caplog):
    cut, _ = killed("dsmd")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level("WARNING", "crosstill"):
            crosstill("train", home / "features", "--out", cut, "--resume")
    finally:
        torch.set_num_threads(threads)
    said = f"this run had 1 processes of {threads} threads and goes on with 1 of {threads + 1}"
    assert said in caplog.text


def test_ctrl_c_before_a_run_has_begun_says_so(home, tmp_path, monkeypatch):
    monkeypatch.setattr("crosstill.cache.open", lambda _: signal.raise_signal(signal.SIGINT))
    result = crosstill("train", home / "features", "--out", tmp_path / "run", code=130)
    assert result.stderr.splitlines()[-1] == "interrupted; the same command starts it"


def test_python_resumes_in_the_runs_order_whatever_order_it_gives(home, killed):
    cut, whole = killed("dsmd")
    settings = recipes.resumed(cut)
    backwards = settings.model_copy(update={"losses": dict(reversed(settings.losses.items()))})
    recipes.distill(None, Cache(home / "features"), backwards, out=cut, resume=True)
    assert same(state_of(cut), state_of(whole))


def test_another_recipe_is_refused(home, killed):
    cut, _ = killed("dsmd")
    typed = ("train", home / "features", "--out", cut, "--resume")
    error = refusal(*typed, "--recipe", "kd")
    assert error == (
        f"error: --recipe kd: {cut} was started with dsmd, which a resumed run keeps; "
        "leave --recipe out, or start another run"
    )
    crosstill(*typed, "--recipe", "dsmd")
