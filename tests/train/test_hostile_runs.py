"""Runs of a stranger: every checksum in them is right."""

import json
import shutil
from pathlib import Path

import pytest

from crosstill import files
from crosstill.errors import CorruptError, InputError
from crosstill.train import Run, TrainConfig, checkpoint, train
from support import SETTINGS, small_student
from verbs import crosstill


@pytest.fixture(scope="module")
def whole(cached, tmp_path_factory) -> Path:
    settings = TrainConfig(**SETTINGS | {"epochs": 1})
    return train(
        small_student(cached), cached, settings, tmp_path_factory.mktemp("whole") / "run"
    ).folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "theirs/run"))


def line(*arguments: object) -> str:
    """The one line with which a verb refuses a file."""
    lines = crosstill(*arguments, code=1).stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, lines
    return lines[-1]


def put(run: Path, where: str, value: object) -> None:
    """Change one field of a run's record, and seal it again."""
    record = json.loads((run / "config.json").read_text())
    *way, last = where.split(".")
    held = record
    for key in way:
        held = held[key]
    held[last] = value
    files.write_json(run / "config.json", files.sealed(record))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("settings", []),
        ("settings.epochs", "many"),
        ("settings.val_split", 3),
        ("settings.balance", {}),
        ("losses", "feature"),
        ("losses", ["feature", "another"]),
        ("cache", None),
        ("cache.folder", 3),
        ("cache.digest", []),
        ("teacher", "small"),
        ("teacher.name", {}),
        ("data", None),
        ("command", ["crosstill"]),
        ("versions", {"torch": 2}),
    ],
)
def test_a_record_of_wrong_types_is_refused_by_every_verb(run, cached, tmp_path, where, value):
    put(run, where, value)
    place = f"config.json: {where}"
    assert place in line("report", run)
    assert place in line("export", run, "--out", tmp_path / "out")
    assert place in line("train", cached.folder, "--out", run, "--resume")


@pytest.mark.parametrize(("where", "value"), [("teacher", "small"), ("cache", {"folder": 3})])
def test_evaluate_reads_the_same_record(run, where, value):
    put(run, where, value)
    assert f"config.json: {where}" in line("evaluate", run, "scenes:60", "--split", "val")


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_records_that_are_missing_or_links(run, tmp_path, name):
    shutil.move(run / name, tmp_path / "secret")
    with pytest.raises(InputError if name == "metrics.json" else CorruptError, match="missing"):
        _ = Run(run).metrics, Run(run).config
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError, match=f"{name}: a link"):
        _ = Run(run).metrics, Run(run).config


@pytest.mark.parametrize("text", ["[]", "{}", '{"best": 3, "teacher": null}', '{"best": {}}'])
def test_a_summary_of_wrong_types_is_refused(run, cached, text):
    (run / "metrics.json").write_text(text)
    with pytest.raises(CorruptError, match=r"metrics\.json: ") as caught:
        _ = Run(run).metrics
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["config.json", "events.jsonl", "student", "best", "best.new", "checkpoints", "tensorboard"],
)
def test_a_run_writes_to_no_link(run, cached, tmp_path, name):
    mine = tmp_path / "mine"
    if (run / name).exists():
        shutil.move(run / name, mine)
    else:
        mine.mkdir()
        (mine / "thesis.tex").write_text("mine")
    (run / name).symlink_to(mine)
    before = contents(tmp_path)
    said = line("train", cached.folder, "--out", run, "--resume")
    assert f"{name}: a link" in said
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, bytes]:
    held = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.read_bytes() for path in held if path.is_file()}


def test_a_new_run_starts_through_no_link(cached, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.starting").symlink_to(tmp_path / "mine")
    with pytest.raises(CorruptError, match=r"\.starting: a link"):
        train(small_student(cached), cached, TrainConfig(**SETTINGS), tmp_path / "run")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("piece", "value"),
    [
        ("position", {"epoch": "x", "step": 0, "total": 3}),
        ("position", {"epoch": 0, "step": -1, "total": 3}),
        ("position", 7),
        ("best", {"epoch": 1, "rsum": "high"}),
        ("best", []),
        ("student", {}),
        ("losses", 3),
        ("balance", []),
        ("optimizer", {"state": 3, "param_groups": []}),
        ("names", []),
        ("names", {"losses": 3}),
        ("rng_torch", 3),
        ("rng_numpy", []),
        ("rng_python", [3, [2**70], None]),
    ],
)
def test_a_checkpoint_of_wrong_types_is_refused(run, cached, piece, value):
    state = checkpoint.load_latest(run / "checkpoints")
    assert state is not None
    checkpoint.save(run / "checkpoints", 99, {**state, piece: value}, keep=1)
    assert f"{run / 'checkpoints'}: " in line("train", cached.folder, "--out", run, "--resume")


@pytest.mark.parametrize("change", [{"data_sha256": 3}, {"data_sha256": None}, {"format": [2]}])
def test_the_record_of_a_checkpoint_is_typed(run, cached, change):
    for path in (run / "checkpoints").glob("*.json"):
        files.write_json(path, files.sealed(json.loads(path.read_text()) | change))
    said = line("train", cached.folder, "--out", run, "--resume")
    assert "every checkpoint is damaged" in said


def test_a_checkpoint_is_no_link(run, cached, tmp_path):
    for path in (run / "checkpoints").glob("*.safetensors"):
        shutil.move(path, tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    said = line("train", cached.folder, "--out", run, "--resume")
    assert "every checkpoint is damaged" in said


@pytest.mark.parametrize(
    "text",
    [
        *(b"\xff\xfe", b'{"kind": "epoch", "epoch": 1e999, "val": {"rsum": 1}}', b"[" * 100_000),
        b'{"kind": "epoch", "epoch": 1, "val": {"rsum": "high"}}',
        b'{"kind": "step", "step": 1, "losses": {"a": {}}, "weights": {}}',
    ],
    ids=range(5),
)
def test_a_log_of_wrong_types_is_refused_and_resumed(run, cached, text):
    lines = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(lines + text + b"\n")
    assert f"events.jsonl, line {len(lines.splitlines()) + 1}: " in line("report", run)
    crosstill("train", cached.folder, "--out", run, "--resume")


@pytest.mark.parametrize("place", ["student", "best"])
@pytest.mark.parametrize("value", [1.5, [], None])
def test_a_student_of_wrong_types_is_refused(run, place, value):
    path = run / place / "student.json"
    record = json.loads(path.read_text()) | {"preprocess": value}
    files.write_json(path, files.sealed(record))
    assert "student.json: not readable" in line("report", run)
