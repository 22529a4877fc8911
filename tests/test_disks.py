"""Every verb on a full disk, and killed within a write.

A full disk is one line, nothing is spoilt, and the same command ends well later.

Disks are small tmpfs where root may mount them. Elsewhere a limit on the size of files stands in.
"""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from crosstill import data, files, students
from crosstill.cli.app import app
from crosstill.data import scenes as scenery
from crosstill.errors import DiskFullError
from export import small as exports
from support import small_config
from teachers import fusion_models
from teachers.released_files import RETRIEVAL, small, write_tokenizer
from verbs import TOML, crosstill

KB = 1024
SIZES = tuple(KB * size for size in (8, 24, 64, 128, 256, 512, 1024))
LARGE = 64 * KB * KB
FAST = [w for c in ("epochs=1", "steps_per_epoch=2", "batch_size=16") for w in ("--set", c)]
ROOM = r": No space left on device \([^()]+\); free some and run it again$"


@contextmanager
def disk(place: Path, size: int) -> Iterator[Callable[[int], object]]:
    """A disk of so many bytes at `place`, and a function that gives it another size."""
    place.mkdir()
    mount(place, size)
    try:
        yield lambda size: mount(place, size, "remount,")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


def mount(place: Path, size: int, how: str = "") -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", place]
    if subprocess.run(command, capture_output=True).returncode:
        place.rmdir()
        pytest.skip("mounting a disk takes root")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What a few verbs read: photos, a teacher, its cache, a run."""
    home = tmp_path_factory.mktemp("home")
    scenery.write(home / "photos", 40)
    students.build(small_config(), dim=16, captions=captions(home)).save(home / "teacher")
    (home / "small.toml").write_text(TOML)
    photos, student = home / "photos/dataset.json", ["--student", home / "small.toml", *FAST]
    crosstill("cache", home / "teacher", photos, "--out", home / "of-teacher")
    crosstill("train", home / "of-teacher", "--out", home / "run", *student)
    return home


def captions(home: Path) -> list[str]:
    pairs = data.open(home / "photos/dataset.json")
    return [text for example in pairs.examples for text in example.captions]


@pytest.fixture(scope="module")
def furnished(home) -> Path:
    """The same with what the other verbs read: vectors, caches, a bundle, a released file."""
    fusion_models.save("vilt", home / "vilt", captions(home))
    (home / "vectors").mkdir()
    names = sorted(path.name for path in (home / "photos").glob("*.png"))
    rows = np.random.default_rng(0).normal(size=(40, 300)).astype(np.float32)
    np.save(home / "vectors/vectors.npy", rows)
    (home / "vectors/filenames.txt").write_text("\n".join(names) + "\n")
    photos = home / "photos/dataset.json"
    crosstill("cache", home / "vectors", photos, "--out", home / "of-vectors")
    crosstill("cache", home / "vilt", photos, "--out", home / "scores", *FEW)
    crosstill("export", home / "run", "--out", home / "bundle")
    exports.small().save(home / "pooled")
    crosstill("cache", home / "teacher", "scenes:320", "--out", home / "many")
    save_file(small(RETRIEVAL, layers=1), home / "meter.safetensors")
    write_tokenizer(home / "tokenizer")
    return home


FEW = ["--false", 3, "--false-images", 2]


def verbs(home: Path, out: Path) -> dict[str, list[object]]:
    """Every verb that writes, to `out`."""
    photos, small = home / "photos/dataset.json", ["--student", home / "small.toml", *FAST]
    converting = ["--tokenizer", home / "tokenizer", "--out", out]
    return {
        "cache": ["cache", home / "teacher", photos, "--out", out, "--views", 3],
        "cache of scores": ["cache", home / "vilt", photos, "--out", out, *FEW],
        "cache of vectors": ["cache", home / "vectors", photos, "--out", out],
        "cache of captions": ["cache", "none", photos, "--out", out],
        "join": ["join", home / "of-teacher", home / "of-vectors", "--out", out],
        "train": ["train", home / "of-teacher", "--out", out, *small],
        "train half": [
            "train",
            home / "scores",
            "--out",
            out,
            "--student",
            "half",
            "--recipe",
            "dcd",
            *FAST,
            "--set",
            "losses.dcd.hardest=2",
        ],
        "export onnx": ["export", home / "run", "--out", out],
        "export sentence": ["export", home / "run", "--out", out, "--to", "sentence-transformers"],
        "export transformers": ["export", home / "pooled", "--out", out, "--to", "transformers"],
        "index": ["index", home / "bundle", home / "photos", "--out", out],
        "report": ["report", home / "run", "--out", out, "--no-latency"],
        "ablate": [
            "ablate",
            "table6",
            home / "many",
            "--seeds",
            1,
            "--out",
            out,
            *small,
            "--set",
            "losses.contrastive.queue_size=64",
        ],
        "inspect": ["inspect", home / "meter.safetensors", *converting],
    }


VERBS = tuple(verbs(Path(), Path()))

# files that hold times, paths or names of the moment
TOLD = (".json", ".jsonl", ".lock", ".html", ".md", ".tex", "answers.npz", ".onnx", ".csv")
# and a pooler that the library makes up at random
TOLD += ("text_0_Transformer/model.safetensors", ".sqlite")


def run(words: list[object]) -> tuple[int, str]:
    """Exit code and the last line of a verb; nothing may escape it."""
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, (result.stderr.splitlines() or [""])[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def again(verb: str, words: list[object], out: Path) -> list[object]:
    """The command that goes on: the same, or for a run that was begun with --resume."""
    if not verb.startswith("train") or not (out / "config.json").is_file():
        return words
    at = words.index("--student")
    return [*words[:at], *words[at + 2 :], "--resume"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_on_disks_of_many_sizes(furnished, tmp_path, verb):
    """Until one is large enough: refused in one line, then the same command ends as anywhere."""
    small, failed = tmp_path / "small", 0
    whole = tmp_path / "whole"
    (whole / "out").mkdir(parents=True)
    assert run(verbs(furnished, whole / "out")[verb])[0] == 0, run(
        verbs(furnished, whole / "out")[verb]
    )
    for size in SIZES:
        with disk(small, size) as resize:
            words = verbs(furnished, small / "out")[verb]
            code, line = run(words)
            if code == 0:
                break
            failed += 1
            assert code == 1 and re.search(f"^error: {small}/out.*{ROOM}", line), line
            assert ".writing-" not in line and not list(small.rglob(".writing-*"))
            resize(LARGE)
            code, line = run(again(verb, words, small / "out"))
            assert code == 0, line
            assert not list(small.rglob(".writing-*"))
            made, expected = contents(small / "out"), contents(whole / "out")
            assert made.keys() == expected.keys()
            for name in made:
                if not name.endswith(TOLD):
                    assert made[name] == expected[name], name
    assert failed


@pytest.mark.slow
def test_decoding_into_a_cache_on_a_full_disk(home, tmp_path):
    """What is kept beside a cache is mapped, and a write into a hole kills without a word."""
    size = sum(len(data) for data in contents(home / "of-teacher").values()) + 24 * KB
    with disk(tmp_path / "small", size) as resize:
        words = of_a_copy(home, tmp_path, tmp_path / "small/cache")
        code, line = run(words)
        assert code == 1 and re.search(f"^error: {tmp_path}/small/cache/pixels/.*{ROOM}", line)
        resize(LARGE)
        assert run(again("train", words, tmp_path / "run"))[0] == 0


def of_a_copy(home: Path, out: Path, copy: Path) -> list[object]:
    """Train from a cache in which nothing was decoded, at a size larger than the student."""
    shutil.copytree(home / "of-teacher", copy, ignore=shutil.ignore_patterns("pixels"))
    (out / "large.toml").write_text(TOML.replace("image_size = 16", "image_size = 64"))
    words = verbs(home, out / "run")["train"]
    words[1], words[words.index("--student") + 1] = copy, out / "large.toml"
    return words


@pytest.mark.slow
def test_an_earlier_export_stays_whole_on_a_full_disk(furnished, tmp_path):
    with disk(tmp_path / "small", LARGE) as resize:
        shutil.copytree(furnished / "bundle", tmp_path / "small/out")
        before = contents(tmp_path / "small/out")
        resize(sum(map(len, before.values())) + 100 * KB)
        code, line = run(verbs(furnished, tmp_path / "small/out")["export onnx"])
        assert code == 1 and re.search(f"^error: {tmp_path}/small/out{ROOM}", line), line
        assert contents(tmp_path / "small/out") == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [40 * KB, 4000 * KB])
def test_the_demo_on_a_full_disk(tmp_path, size):
    with disk(tmp_path / "small", size):
        code, line = run(["demo", "--out", tmp_path / "small/out"])
        assert code == 1 and re.search(f"^error: {tmp_path}/small/out.*{ROOM}", line), line


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process may be larger; unlike a small disk, it takes no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("verb", ["train", pytest.param("export sentence", marks=pytest.mark.slow)])
def test_a_file_larger_than_is_allowed(home, tmp_path, verb):
    words = verbs(home, tmp_path / "out")[verb]
    with limited(40 * KB):
        code, line = run(words)
    told = r": File too large \(\d+\.\d kB needed\); raise the limit on the size of files"
    assert code == 1 and re.search(f"^error: {tmp_path}/out.*{told}", line), line
    assert not list(tmp_path.rglob(".writing-*"))
    code, line = run(again(verb, words, tmp_path / "out"))
    assert code == 0, line


def test_decoding_is_refused_before_it_begins(home, tmp_path):
    words = of_a_copy(home, tmp_path, tmp_path / "cache")
    with limited(200 * KB):
        code, line = run(words)
    assert code == 1 and f"{tmp_path}/cache/pixels/" in line and ": File too large (" in line, line
    assert run(again("train", words, tmp_path / "run"))[0] == 0


def test_a_full_disk_behind_standard_output(bundle_folder, tmp_path):
    """One line and exit code 1, without what Python says when its last write fails."""
    scenery.write(tmp_path / "photos", 2)
    crosstill("index", bundle_folder, tmp_path / "photos", "--out", tmp_path / "index")
    words = [sys.executable, "-m", "crosstill", "index", "verify", tmp_path / "index"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert re.search(f"^error: /dev/stdout{ROOM}", line), line


def test_one_error_whoever_writes(tmp_path):
    """A quota, and libraries whose errors are no OSError."""
    for error, told in (
        (OSError(errno.EDQUOT, "…"), "Disk quota exceeded (5.0 kB needed); free some and run it"),
        (Exception("io error: No space left on device (os error 28)"), "No space left on device ("),
        (ValueError("database or disk is full"), "No space left on device ("),
    ):
        with pytest.raises(DiskFullError) as caught, files.writing(tmp_path / "a", 5000):
            raise error
        assert str(caught.value).startswith(f"{tmp_path}/a: {told}")
    with pytest.raises(ValueError, match="else"), files.writing(tmp_path):
        raise ValueError("something else")


# --- kills within writes ---


def killed(words: list[object], renames: int) -> bool:
    """Run a verb in a process that is killed at its n-th rename; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            left = iter(range(renames))

            def watch(event: str, arguments: object) -> None:
                if event == "os.rename" and next(left, None) == renames - 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            os._exit(run(words)[0])
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_kill_within_a_write_leaves_is_swept(furnished, tmp_path, verb):
    """Whatever a library had written beside its path goes when the same is written again."""
    kills = 0
    for renames in (1, 2, 3, 5, 8, 13):
        out = tmp_path / str(renames) / "out"
        out.parent.mkdir()
        words = verbs(furnished, out)[verb]
        if not killed(words, renames):
            break
        kills += 1
        assert run(again(verb, words, out))[0] == 0
        left = [path.name for path in out.parent.rglob(".*") if path.name != ".lock"]
        assert not left, left
    assert kills
