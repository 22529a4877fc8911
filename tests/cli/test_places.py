"""Places that cannot be written to or are not there: refused before libraries are loaded."""

import contextlib
import errno
import fcntl
import json
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
import json, sys
from crosstill.cli.app import app
for words in json.load(sys.stdin):
    try:
        app(words)
    except SystemExit as end:
        heavy = {"torch", "transformers"} & sys.modules.keys()
        print(end.code, heavy or "nothing")
"""


def test_help_loads_no_library_that_takes_long():
    program = LOADED.replace('"torch", ', '"torch", "numpy", "pyarrow", "starlette", ')
    words = json.dumps([["--help"], ["train", "--help"], ["export", "--help"], ["serve", "--help"]])
    done = subprocess.run(
        [sys.executable, "-c", program], input=words, capture_output=True, text=True, check=True
    )
    assert [line for line in done.stdout.splitlines() if line[:2] == "0 "] == ["0 nothing"] * 4


def refused(*commands: list[object]) -> list[str]:
    """The lines of verbs that end with 2 and load neither torch nor transformers."""
    words = json.dumps([list(map(str, command)) for command in commands])
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, input=words, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2 nothing"] * len(commands), (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands), lines
    return lines


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


def test_a_place_that_cannot_be_written_to(cached, tmp_path):
    (tmp_path / "file").touch()
    reason = "Permission denied" if os.geteuid() else "Read-only file system"
    with read_only(tmp_path / "closed") as closed:
        places = {tmp_path / "file/deep/out": "Not a directory", closed: reason}
        places[closed / "deep/out"] = reason
        commands = {out: verbs(cached, out) for out in places}
        lines = refused(*(words for table in commands.values() for words in table.values()))
    for out, reason in places.items():
        for verb in commands[out]:
            assert lines.pop(0) == f"error: {out}: cannot write there ({reason})", verb
    assert not list(tmp_path.rglob("out"))


def test_what_is_not_there(tmp_path):
    data, out, photos = tmp_path / "none.json", ["--out", tmp_path / "out"], tmp_path / "photos"
    photos.mkdir()
    no_data = f"error: {data}: no such file or folder; give a dataset"
    with pytest.raises(InputError) as expected:
        cache.open(photos)
    no_cache = f"error: {expected.value}"
    cases = [
        (["doctor", data], no_data),
        (["evaluate", "MODEL", data], no_data),
        (["cache", "none", data, *out], no_data),
        (["export", "RUN", "--data", data, *out], no_data),
        (["train", photos, *out], no_cache),
        (["ablate", "table2", photos, *out], no_cache),
        (["join", photos, *out], no_cache),
        (["cache", "verify", photos], no_cache),
        (["report", tmp_path / "a"], f"error: {tmp_path / 'a'}: no such folder"),
    ]
    assert refused(*(words for words, _ in cases)) == [line for _, line in cases]
    assert not (tmp_path / "out").exists()


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
