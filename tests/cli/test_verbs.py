"""The command line as a user meets it: real files, one line an error."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crosstill import data, students
from crosstill.data import scenes as scenery
from crosstill.files import locked
from support import FAST, PATIENCE, lengthen, small_config, wait_for
from verbs import TOML, crosstill, refusal


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dataset of files, a teacher of its own, a cache and a finished run."""
    home = tmp_path_factory.mktemp("home")
    scenery.write(home / "photos", 60)
    pairs = data.open(home / "photos/dataset.json")
    texts = [text for example in pairs.examples for text in example.captions]
    students.build(small_config(), dim=16, captions=texts).save(home / "teacher")
    (home / "student.toml").write_text(TOML)
    crosstill("cache", home / "teacher", home / "photos/dataset.json", "--out", home / "cache")
    crosstill("train", home / "cache", *TRAIN, "--out", home / "run", *student(home))
    return home


TRAIN = ["--set", "epochs=1", "--set", "batch_size=40"]


def student(home: Path) -> list[object]:
    return ["--student", home / "student.toml"]


def test_the_three_commands_and_the_table(home):
    found = crosstill("evaluate", home / "run", home / "photos/dataset.json", "--efficiency")
    head, _, *rows = found.stdout.splitlines()
    assert "image→text R@1" in head and "RSUM" in head and "ms/image" in head
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["teacher (small)", "student (run)", "student, untrained"]


def test_the_json_of_an_evaluation(home):
    found = crosstill("evaluate", home / "run", home / "photos/dataset.json", "--json")
    values = json.loads(found.stdout)
    for direction in ("i2t", "t2i"):
        assert set(values[direction]) == {"r1", "r5", "r10"}
        assert all(0 <= value <= 100 for value in values[direction].values())
    assert values["images"] == 6 and values["captions"] == 30
    six = [v for d in ("i2t", "t2i") for v in values[d].values()]
    assert values["rsum"] == pytest.approx(sum(six))
    assert values["teacher"]["images"] == 6


def test_a_teacher_and_its_cache_agree(home):
    direct = crosstill("evaluate", home / "teacher", home / "photos/dataset.json", "--json")
    cached = crosstill("evaluate", home / "run", home / "photos/dataset.json", "--json")
    rsum = json.loads(cached.stdout)["teacher"]["rsum"]
    # half-precision rows may move a near tie among six images by one rank
    assert json.loads(direct.stdout)["rsum"] == pytest.approx(rsum, abs=20)


def test_verify_and_a_second_build_find_the_cache_whole(home):
    assert "whole; 60 images" in crosstill("cache", "verify", home / "cache").stdout
    again = ("cache", home / "teacher", home / "photos/dataset.json", "--out", home / "cache")
    assert "whole; 60 images" in crosstill(*again).stdout


def test_a_finished_run_resumes_to_itself(home):
    before = (home / "run/metrics.json").read_bytes()
    crosstill("train", home / "cache", "--out", home / "run", "--resume")
    assert (home / "run/metrics.json").read_bytes() == before


def test_a_finished_run_names_what_comes_next_in_commands_that_work(home):
    told = crosstill("train", home / "cache", "--out", home / "run", "--resume").stderr
    report, evaluate, export = (shlex.split(line)[1:] for line in told.splitlines()[-3:])
    assert crosstill(*report, "--no-latency").stdout.strip().endswith("report.html")
    given = [
        {"DATA": home / "photos/dataset.json", "DIR": home / "photos"}.get(a, a) for a in evaluate
    ]
    assert "student (run)" in crosstill(*given).stdout
    crosstill(*export)
    assert (home / "run-onnx/bundle.json").is_file()


def test_doctor_describes_machine_and_data(home, tmp_path):
    assert "torch" in crosstill("doctor").stdout
    scenery.write(tmp_path, 20)
    (tmp_path / "000007.png").write_bytes(b"rubbish")
    found = crosstill("doctor", tmp_path / "dataset.json", "--model", home / "run", "--json")
    report = json.loads(found.stdout)["data"]
    assert report["splits"] == {"train": 16, "val": 2, "test": 2}
    assert [row["path"] for row in report["unreadable"]] == ["000007.png"]
    assert report["captions_per_image"]["histogram"] == {"5": 20}
    text = crosstill("doctor", tmp_path / "dataset.json").stdout
    assert "000007.png: not an image" in text


def test_photos_without_a_vector_are_not_called_unreadable(home, tmp_path, caplog):
    scenery.write(tmp_path / "photos", 20)
    (tmp_path / "photos/000007.png").write_bytes(b"rubbish")
    folder = tmp_path / "vectors"
    folder.mkdir()
    known = [f"{row:06d}.png" for row in range(20) if row not in (3, 4)]
    (folder / "filenames.txt").write_text("\n".join(known))
    np.save(folder / "image.npy", np.random.default_rng(0).normal(size=(18, 16)))
    listing = tmp_path / "photos/dataset.json"
    made = crosstill("cache", folder, listing, "--out", tmp_path / "cache")
    said = "unreadable images left out: 1; no vector for 2 photos, listed in"
    assert said in made.stderr
    instance = ("--recipe", "info_nce", "--set", "losses.instance.side=image")
    with caplog.at_level("WARNING", "crosstill"):
        crosstill(
            *("train", tmp_path / "cache", *student(home), *instance, *TRAIN),
            *("--set", "batch_size=4", "--out", tmp_path / "run"),
        )
    assert said in caplog.text


def test_bad_images_are_counted_on_screen(home, tmp_path):
    scenery.write(tmp_path / "photos", 20)
    (tmp_path / "photos/000007.png").write_bytes(b"rubbish")
    listing = tmp_path / "photos/dataset.json"
    made = crosstill("cache", home / "teacher", listing, "--out", tmp_path / "cache")
    assert "unreadable images left out: 1" in made.stderr
    run = ("train", tmp_path / "cache", *student(home), *TRAIN, "--out", tmp_path / "run")
    crosstill(*run)
    (row,) = map(json.loads, (tmp_path / "run/quarantine.jsonl").read_text().splitlines())
    assert row["path"] == "000007.png"
    strict = ("cache", home / "teacher", listing, "--out", tmp_path / "other", "--strict")
    assert "000007.png: not an image" in refusal(*strict)


def test_captions_that_are_cut_are_counted(home, tmp_path, caplog):
    listing = lengthen(home / "photos/dataset.json", tmp_path / "long.json")
    rest = ("--images", home / "photos")
    cut = "captions longer than a model reads, cut: "
    crosstill("cache", home / "teacher", listing, *rest, "--out", tmp_path / "cache")
    assert caplog.messages.count(f"{cut}small 60 of 300") == 1
    crosstill("train", tmp_path / "cache", *TRAIN, "--out", tmp_path / "run", *student(home))
    assert caplog.messages.count(f"{cut}small 54 of 270") == 1
    told = crosstill("evaluate", tmp_path / "run", listing, *rest, "--beside", home / "teacher")
    assert f"{cut}student (run) 6 of 30, {home / 'teacher'} 6 of 30" in told.stderr.splitlines()
    plain = crosstill("evaluate", home / "run", home / "photos/dataset.json")
    assert "cut:" not in plain.stderr


def test_captions_without_a_teacher_train_with_info_nce(home, tmp_path):
    listing = home / "photos/dataset.json"
    crosstill("cache", "none", listing, "--out", tmp_path / "none")
    options = (*student(home), *TRAIN, "--recipe", "info_nce", "--out", tmp_path / "run")
    crosstill("train", tmp_path / "none", *options)
    found = crosstill("evaluate", tmp_path / "run", listing)
    assert "no teacher's row" not in found.stderr and "teacher" not in found.stdout


# --- wrong input: one line, exit code 2 ---


def test_an_unknown_key(home, tmp_path):
    change = ("train", home / "cache", "--out", tmp_path / "r", "--set", "epoch=3")
    assert "unknown key 'epoch'; did you mean 'epochs'" in refusal(*change)


def test_an_unknown_option_of_a_loss(home, tmp_path):
    change = ("--set", "losses.contrastive.temprature=0.1")
    line = refusal("train", home / "cache", *student(home), "--out", tmp_path / "r", *change)
    assert "temprature" in line and "temperature" in line


def test_a_missing_image_file(home, tmp_path):
    scenery.write(tmp_path, 20)
    (tmp_path / "000007.png").unlink()
    line = refusal("cache", home / "teacher", tmp_path / "dataset.json", "--out", tmp_path / "c")
    assert "000007.png" in line


def test_a_caption_file_without_captions(home, tmp_path):
    (tmp_path / "pairs.csv").write_text("filepath,caption\n")
    line = refusal("cache", home / "teacher", tmp_path / "pairs.csv", "--out", tmp_path / "c")
    assert "pairs.csv" in line


def test_a_teacher_folder_without_tokenizer(home, tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path / "clip")
    listing = home / "photos/dataset.json"
    line = refusal("cache", tmp_path / "clip", listing, "--out", tmp_path / "c")
    assert "tokenizer" in line


def test_a_model_that_is_nowhere(home, tmp_path):
    listing = home / "photos/dataset.json"
    assert "no such folder" in refusal("cache", "./nowhere", listing, "--out", tmp_path / "c")


def test_a_cache_of_another_dataset_and_of_another_teacher(home, tmp_path):
    scenery.write(tmp_path / "photos", 20)
    listing = tmp_path / "photos/dataset.json"
    line = refusal("cache", home / "teacher", listing, "--out", home / "cache")
    assert "another dataset" in line
    listing = home / "photos/dataset.json"
    assert "another teacher" in refusal("cache", "none", listing, "--out", home / "cache")


def test_a_run_folder_that_holds_a_run(home):
    line = refusal("train", home / "cache", *student(home), "--out", home / "run")
    assert "already holds a run" in line


def test_a_run_folder_in_use(home, tmp_path):
    with locked(tmp_path):
        line = refusal("train", home / "cache", *student(home), *TRAIN, "--out", tmp_path)
    assert "in use by process" in line


def test_a_cache_is_no_model(home):
    listing = home / "photos/dataset.json"
    assert "a cache, not a model" in refusal("evaluate", home / "cache", listing)


def test_a_split_without_images(home):
    line = refusal("evaluate", home / "run", home / "photos/dataset.json", "--split", "tset")
    assert "'tset' has no images" in line and "test (6)" in line


def test_a_width_that_does_not_fit(home, tmp_path):
    (tmp_path / "wide.toml").write_text("dim = 99\n" + TOML)
    options = ("--student", tmp_path / "wide.toml", "--out", tmp_path / "r")
    line = refusal("train", home / "cache", *options)
    assert "99" in line and "16" in line


def test_all_images_unreadable(home, tmp_path):
    scenery.write(tmp_path, 10)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"rubbish " + path.name.encode())
    line = refusal("cache", home / "teacher", tmp_path / "dataset.json", "--out", tmp_path / "c")
    assert "all 10 images are unreadable" in line


def test_an_unknown_preset_recipe_and_protocol(home, tmp_path):
    line = refusal("train", home / "cache", "--student", "mobil", "--out", tmp_path / "r")
    assert "did you mean 'mobile'" in line
    line = refusal("train", home / "cache", "--recipe", "dsmb", "--out", tmp_path / "r")
    assert "did you mean 'dsmd'" in line
    listing = home / "photos/dataset.json"
    line = refusal("evaluate", home / "run", listing, "--protocol", "fulll")
    assert "did you mean 'full'" in line


def test_a_folder_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").touch()
    listing = home / "photos/dataset.json"
    line = refusal("cache", home / "teacher", listing, "--out", tmp_path / "file")
    assert "cannot write there" in line


def test_a_wrong_option_is_wrong_input():
    assert "No such option" in crosstill("train", "--nonsense", code=2).stderr


# --- in a process of its own ---


def process(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "crosstill", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_errors_leave_through_stderr_and_the_exit_code(tmp_path):
    done = process("cache", "verify", tmp_path / "none")
    out, err = done.communicate()
    assert (done.returncode, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'none'}: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_says_so_and_goes_on(home, tmp_path, number, code):
    long = ["--set", "epochs=200", "--set", "batch_size=40"]
    run = process("train", home / "cache", *student(home), *long, "--out", tmp_path / "r")
    wait_for(lambda: (tmp_path / "r/best.json").exists() or run.poll() is not None)
    run.send_signal(number)
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == code, err
    assert "checkpoint" in err and "Traceback" not in err
    assert list((tmp_path / "r/checkpoints").glob("*.json"))


@pytest.mark.slow
def test_two_processes_through_torchrun_speak_once(home, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    verb = ["-m", "crosstill", "train", home / "cache", *student(home), *TRAIN]
    done = subprocess.run(
        [*map(str, [*launcher, "--nproc-per-node=2", *verb, "--out", tmp_path / "r"])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best val RSUM") == 1


ABLATE = [
    "--set",
    "epochs=1",
    "--set",
    "batch_size=40",
    "--set",
    "losses.contrastive.queue_size=64",
]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("table3", ["--seeds", 1], "--seeds: table3 trains nothing; leave it out"),
        ("table1", ["--seeds", 1], "no table named 'table1'; did you mean"),
        ("table10", ABLATE, "split 'val' has 6 images, and the bootstrap"),
        ("table10", ["--set", "balance=dwa"], "table10 varies that itself"),
        ("table2", ["--freeze", "heads"], "freeze = 'heads'"),
    ],
)
def test_ablate_refuses_in_one_line(home, tmp_path, table, options, message):
    out = ["--out", tmp_path / "grid"]
    assert message in refusal("ablate", table, home / "cache", *out, *student(home), *options)
    assert not (tmp_path / "grid").exists()


def test_a_method_that_looks_inside_needs_a_live_teacher(home, tmp_path):
    options = ["--set", "losses=fitnets", "--set", "balance=fixed", "--out", tmp_path / "run"]
    line = refusal("train", home / "cache", *student(home), *options)
    assert "fitnets: reads intermediate layers" in line and "--set teacher=" in line


def test_report_of_a_run_and_of_what_is_none(home, tmp_path):
    told = crosstill("report", home / "run", "--out", tmp_path, "--no-latency")
    assert told.stdout.strip() == str(tmp_path / "report.html")
    assert "neither a run nor a grid" in refusal("report", home / "photos")
    shutil.copytree(home / "run", tmp_path / "unfinished")
    (tmp_path / "unfinished/metrics.json").unlink()
    line = refusal("report", tmp_path / "unfinished")
    assert "not finished" in line and "--resume" in line


def test_ablate_prints_its_table(many, home, tmp_path):
    options = [part for change in FAST for part in ("--set", change)]
    verb = ["ablate", "table6", many.folder, "--out", tmp_path / "grid", *student(home)]
    told = crosstill(*verb, "--seeds", 2, *options)
    assert "| student not |" in told.stdout and "± " in told.stdout
    assert (
        "Left out: neither, takes the teacher's raw rows, which `crosstill cache --raw`"
        in told.stdout
    )
    assert told.stdout.strip() == (tmp_path / "grid/table6.md").read_text().strip()
