"""Places that cannot be written to or are not there: refused before libraries are loaded."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crosstill import cache
from crosstill.cache import Cache
from crosstill.errors import InputError
from verbs import refusal

LOADED = """
import sys
from crosstill.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print({"torch", "transformers"} & sys.modules.keys() or "nothing")
"""


def refused(*words: object) -> str:
    """The line of a verb that ends with 2 and has loaded neither torch nor transformers."""
    command = [sys.executable, "-c", LOADED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "nothing\n"), (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    return line


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder that nobody can write to, root neither."""
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def verbs(cached: Cache, out: Path) -> dict[str, list[object]]:
    return {
        "cache": ["cache", "none", "scenes:5", "--out", out],
        "join": ["join", cached.folder, "--out", out],
        "train": ["train", cached.folder, "--out", out],
        "export": ["export", cached.folder, "--out", out],
        "index": ["index", cached.folder, cached.folder, "--out", out],
        "report": ["report", cached.folder, "--out", out],
        "ablate": ["ablate", "table2", cached.folder, "--out", out],
        "inspect": ["inspect", cached.folder, "--out", out, "--tokenizer", cached.folder],
        "demo": ["demo", "--out", out],
    }


VERBS = (
    "cache",
    "join",
    "train",
    "export",
    "index",
    "report",
    "ablate",
    "inspect",
    "demo",
)


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_cannot_be_written_to(cached, tmp_path, verb):
    (tmp_path / "file").touch()
    under = tmp_path / "file/deep/out"
    line = refused(*verbs(cached, under)[verb])
    assert line == f"error: {under}: cannot write there (Not a directory)"
    with read_only(tmp_path / "closed") as closed:
        for out in (closed, closed / "deep/out"):
            line = refused(*verbs(cached, out)[verb])
            reason = "Permission denied" if os.geteuid() else "Read-only file system"
            assert line == f"error: {out}: cannot write there ({reason})"
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize(
    "words", [["doctor"], ["evaluate", "MODEL"], ["cache", "none"], ["export", "RUN", "--data"]]
)
def test_a_dataset_that_is_not_there(tmp_path, words):
    data, out = tmp_path / "none.json", ["--out", tmp_path / "out"]
    line = refused(*words, data, *(out if words[0] in ("cache", "export") else []))
    assert line == f"error: {data}: no such file or folder; give a dataset"


@pytest.mark.parametrize("words", [["train"], ["ablate", "table2"], ["join"], ["cache", "verify"]])
def test_a_cache_that_is_not_there(tmp_path, words):
    (tmp_path / "photos").mkdir()
    out = [] if words[-1] == "verify" else ["--out", tmp_path / "out"]
    line = refused(*words, tmp_path / "photos", *out)
    with pytest.raises(InputError) as expected:
        cache.open(tmp_path / "photos")
    assert line == f"error: {expected.value}"
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing(tmp_path):
    assert refused("report", tmp_path / "a") == f"error: {tmp_path / 'a'}: no such folder"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_share_without_locks(cached, tmp_path, monkeypatch, code):
    """Its answer to flock is not that of a folder which another process holds."""

    def flock(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    line = refusal("cache", "none", "scenes:5", "--out", tmp_path / "c")
    assert line == (
        f"error: {tmp_path / 'c'}: cannot be locked ({os.strerror(code)}), so two processes could "
        "spoil it; use a folder on a local disk, or mount the share with locks"
    )
