"""Grids that really run: shared runs, several workers, failures, and kills."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crosstill import ablate, data
from crosstill.ablate import grid, plan
from crosstill.cache import build
from crosstill.errors import (
    CorruptError,
    InputError,
    LockedError,
    NonFiniteError,
    RunError,
)
from crosstill.files import locked
from support import FAST, RawTeacher, SmallTeacher, flip
from verbs import crosstill


def fill(many, toml, out, table="table10", seeds=(0, 1), **options) -> ablate.Table:
    return ablate.run(table, many, out, student=toml, changes=FAST, seeds=seeds, **options)


@pytest.fixture(scope="module")
def done(many, toml, tmp_path_factory):
    """Table 10 with two seeds, left alone, and its folder."""
    out = tmp_path_factory.mktemp("grid")
    return fill(many, toml, out), out


def test_the_table_is_what_the_runs_measured(done):
    table, out = done
    assert [row.name for row in table.rows] == ["T = 0.05", "T = 0.2", "T = 0.5", "T = 1"]
    for row in table.rows:
        metrics = [json.loads((run / "metrics.json").read_text())["best"] for run in row.runs]
        rsums = [m["rsum"] for m in metrics]
        assert row.rsum.mean == pytest.approx(sum(rsums) / 2)
        assert row.rsum.std == pytest.approx(abs(rsums[0] - rsums[1]) / 2**0.5)
        firsts = [m["val"]["t2i"]["r1"] for m in metrics]
        assert row.recalls[3].mean == pytest.approx(sum(firsts) / 2)
    reference = table.rows[-1]
    assert reference.difference is None
    for row in table.rows[:-1]:
        gap = row.rsum.mean - reference.rsum.mean
        assert row.difference.rsum == pytest.approx(gap)
        assert row.difference.low <= gap <= row.difference.high
    assert table.teacher is not None
    text = (out / "table10.md").read_text()
    assert text == ablate.markdown(table)
    assert "teacher (small)" in text and "reference" in text and "447.5" in text
    assert r"\begin{tabular}" in (out / "table10.tex").read_text()


def test_a_finished_grid_runs_nothing_and_reads_the_same(done, many, toml, monkeypatch):
    table, out = done
    monkeypatch.setattr(grid, "train", None)
    assert fill(many, toml, out) == table
    assert ablate.read(out) == [table]
    assert ablate.is_grid(out) and not ablate.is_grid(out / "runs")


def test_tables_share_runs(done, many, toml):
    _, out = done
    before = {path.name for path in (out / "runs").iterdir()}
    table = fill(many, toml, out, "table9", seeds=(0,))
    new = {path.name for path in (out / "runs").iterdir()} - before
    assert len(new) == 4  # four margins; the fifth row is Table 10's reference
    assert [t.name for t in ablate.read(out)] == ["table9", "table10"]
    (out / "table9.json").unlink()
    assert len(table.rows) == 5


def without(done, place: Path, *runs: Path) -> Path:
    """A copy of the grid in which some of its runs are still to do."""
    shutil.copytree(done[1], place)
    for run in runs:
        shutil.rmtree(place / "runs" / run.name)
    return place


@pytest.mark.slow
def test_two_workers_fill_the_same_table(done, many, toml, tmp_path):
    out = without(done, tmp_path / "grid", *done[0].rows[2].runs)
    assert ablate.markdown(fill(many, toml, out, workers=2)) == ablate.markdown(done[0])


@pytest.mark.parametrize(
    ("workers", "gpus", "visible", "expected"),
    [
        (3, 2, None, ["0", "1", "0"]),
        (2, 2, "5,GPU-7a", ["5", "GPU-7a"]),
        (2, 0, None, ["", ""]),
    ],
)
def test_workers_take_turns_on_the_gpus(monkeypatch, workers, gpus, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert grid.devices(workers, gpus) == expected


def test_one_failing_run_does_not_lose_the_others(done, many, toml, tmp_path, monkeypatch):
    real = grid.train

    def breaks_once(student, cache, settings, *rest, **options):
        if settings.balance.get("temperature") == 0.2 and settings.seed == 1:
            raise NonFiniteError("loss 'feature' became nan")
        return real(student, cache, settings, *rest, **options)

    # the one that fails, and the one after it
    out = without(done, tmp_path / "grid", *(row.runs[1] for row in done[0].rows[1:3]))
    monkeypatch.setattr(grid, "train", breaks_once)
    with pytest.raises(RunError, match="1 of 8 runs failed, first T = 0.2, seed 1: loss 'feature'"):
        fill(many, toml, out)
    with pytest.raises(InputError, match="1 of 8 runs of table10 are not finished; run"):
        ablate.read(out)
    monkeypatch.setattr(grid, "train", real)
    assert ablate.markdown(fill(many, toml, out)) == ablate.markdown(done[0])


def test_checkpoints_go_when_a_run_is_done(done):
    runs = [run for row in done[0].rows for run in row.runs]
    assert len(runs) == 8
    assert all((run / "best").is_dir() and not (run / "checkpoints").exists() for run in runs)


@pytest.mark.parametrize("left", ["checkpoints gone", "checkpoints there"])
def test_a_run_that_was_killed_while_it_was_put_away_is_put_away(
    done, many, toml, tmp_path, left, monkeypatch
):
    shutil.copytree(done[1], tmp_path / "grid")
    run = tmp_path / "grid/runs" / done[0].rows[0].runs[0].name
    (run / "done.json").unlink()
    if left == "checkpoints there":
        (run / "checkpoints").mkdir()
    monkeypatch.setattr(grid, "train", None)  # it has been trained
    assert ablate.markdown(fill(many, toml, tmp_path / "grid")) == ablate.markdown(done[0])
    assert (run / "done.json").is_file() and not (run / "checkpoints").exists()


def test_damaged_answers_are_named(done, tmp_path):
    shutil.copytree(done[1], tmp_path / "grid")
    path = tmp_path / "grid/runs" / done[0].rows[0].runs[0].name / "answers.npz"
    path.write_bytes(flip(path.read_bytes(), np.random.default_rng(0)))
    with pytest.raises(CorruptError, match=r"answers.npz: its checksum is wrong"):
        ablate.read(tmp_path / "grid")


def test_one_grid_at_a_time(many, toml, tmp_path):
    with locked(tmp_path), pytest.raises(LockedError, match="in use by process"):
        fill(many, toml, tmp_path)


def test_no_grid_is_said(tmp_path):
    with pytest.raises(InputError, match="no grid there; make one with `crosstill ablate`"):
        ablate.read(tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from crosstill import ablate
from crosstill.cache import Cache
if __name__ == "__main__":
    cache, toml, out, workers, *changes = sys.argv[1:]
    options = {"student": toml, "changes": changes, "seeds": (0, 1), "workers": int(workers)}
    ablate.run("table10", Cache(cache), out, **options)
"""


def started(many, toml, out, workers, script) -> subprocess.Popen:
    command = [sys.executable, str(script), str(many.folder), toml, str(out), str(workers), *FAST]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def killed(process: subprocess.Popen, out, delay: float) -> bool:
    """Kill the grid so long after it wrote its first file of a run; whether it still ran."""
    began = time.time()
    while process.poll() is None:
        if any(path.stat().st_mtime > began for path in out.glob("runs/*/*.json*")):
            time.sleep(delay)
            break
        time.sleep(0.02)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_grid_killed_at_any_moment_fills_the_same_table(done, many, toml, tmp_path, workers):
    script, out = tmp_path / "fill.py", tmp_path / "grid"
    script.write_text(SCRIPT)
    random, kills = np.random.default_rng(workers), 0
    # a run takes half a second, so these fall into training, saving, judging and between runs
    while kills < 12 and killed(
        started(many, toml, out, workers, script), out, random.uniform(0, 0.6)
    ):
        kills += 1
    last = started(many, toml, out, workers, script)
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors.decode()[-2000:]
    assert kills >= 3
    assert (out / "table10.md").read_text() == ablate.markdown(done[0])
    assert plan.load(out / "table10.json")


PAIRS = {
    "vit-bert": ({"model_type": "vit", "image_size": 16, "patch_size": 8}, "cls", "bert"),
    "cnn-bert": (
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "pooler",
        "bert",
    ),
    "deit-albert": ({"model_type": "deit", "image_size": 16, "patch_size": 8}, "cls", "albert"),
}
WIDTH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def run_metrics(row) -> dict:
    return json.loads((row.runs[0] / "metrics.json").read_text())


def words(changes) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def test_table8_leaves_out_queues_that_are_longer_than_the_dataset(toml, tmp_path):
    small = build(SmallTeacher(), data.open("scenes:520"), tmp_path / "cache")
    assert len(small.captions("train")) == 2080
    changes = words(change for change in FAST if "queue_size" not in change)
    typed = ["ablate", "table8", small.folder, "--student", toml, "--out", tmp_path / "grid"]
    told = crosstill(*typed, "--seeds", 1, *changes).stdout
    assert "| K = 1024 |" in told and "| K = 2048 |" in told and "| K = 4096 |" not in told
    assert "against K = 2048" in told
    why = "longer than the 2,080 training captions"
    assert f"Left out: K = 4096, {why}; K = 8192, {why}; K = 16384, {why}." in told
    queues = [
        plan.load(tmp_path / "grid/table8.json").record["rows"][k]["settings"] for k in (0, 1)
    ]
    assert [q["losses"]["contrastive"]["queue_size"] for q in queues] == [1024, 2048]


def test_table6_has_both_halves_where_the_cache_keeps_raw_rows(toml, tmp_path):
    kept = build(RawTeacher(), data.open("scenes:320"), tmp_path / "cache", raw=True)
    typed = ["ablate", "table6", kept.folder, "--student", toml, "--out", tmp_path / "grid"]
    told = crosstill(*typed, "--seeds", 1, *words(FAST)).stdout
    assert "| neither |" in told and "318.9" in told and "Left out" not in told
    (table,) = ablate.read(tmp_path / "grid")
    assert len({row.runs for row in table.rows}) == 3
    losses = {}
    for row in table.rows:
        events = map(json.loads, (row.runs[0] / "events.jsonl").read_text().splitlines())
        losses[row.name] = next(e for e in events if e["kind"] == "step")["losses"]["feature"]
    assert (
        len(set(losses.values())) == 3
    )  # the rows of the teacher that it sees are three times as long


def test_towers_compares_students(many, tmp_path):
    files = []
    for name, (image, pooling, text) in PAIRS.items():
        image = image if name == "cnn-bert" else {**image, **WIDTH}
        image = image if "image_size" in image else {**image, "image_size": 16}
        lines = [f'name = "{name}"', "[image]", f'pooling = "{pooling}"', "[image.config]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in image.items()]
        lines += ["[text.config]"]
        text = {"model_type": text, "vocab_size": 300, **WIDTH}
        lines += [f"{key} = {json.dumps(value)}" for key, value in text.items()]
        files.append(str(tmp_path / f"{name}.toml"))
        (tmp_path / f"{name}.toml").write_text("\n".join(lines))
    out = tmp_path / "grid"
    table = ablate.run("towers", many, out, student=files, changes=FAST, seeds=(0,))
    assert [row.name for row in table.rows] == list(PAIRS)
    assert table.reference == "vit-bert"
    sizes = [run_metrics(row)["parameters"]["total"] for row in table.rows]
    assert [row.parameters for row in table.rows] == sizes and len(set(sizes)) == 3
    text = ablate.markdown(table)
    assert text.splitlines()[2].startswith("|  | parameters | i2t R@1")
    assert all(f"| {name} | {size:,} |" in text for name, size in zip(PAIRS, sizes, strict=True))
    assert len({run for row in table.rows for run in row.runs}) == 3
