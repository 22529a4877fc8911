import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import count
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from crosstill import files
from crosstill.errors import ConfigError, CorruptError, InputError, LockedError
from crosstill.export.export_folder import RECORD, aside
from support import wait_for


def _write(place: Path, text: str, name: str = "model.bin") -> None:
    with aside(place) as new:
        (new / "part").mkdir()
        (new / "part" / name).write_text(text)


def test_it_is_there_whole_with_a_record_of_its_files(tmp_path: Path) -> None:
    _write(tmp_path / "deep" / "out", "one")
    out = tmp_path / "deep" / "out"
    record = files.read_sealed(out / RECORD, {1})
    assert record["files"] == {"part/model.bin": files.digest_file(out / "part" / "model.bin")}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_taken_and_an_earlier_export_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _write(out, "one", "old.bin")
    _write(out, "two")
    assert (out / "part" / "model.bin").read_text() == "two"
    assert not (out / "part" / "old.bin").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_where_the_system_cannot_exchange_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crosstill.files._exchanged", lambda one, other: False)
    test_an_empty_folder_is_taken_and_an_earlier_export_replaced(tmp_path)


def test_a_failure_leaves_all_as_it_was(tmp_path: Path) -> None:
    _write(tmp_path / "out", "one")
    for place in ("out", "new"):
        with pytest.raises(KeyboardInterrupt), aside(tmp_path / place) as new:
            (new / "half").touch()
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "part" / "model.bin").read_text() == "one"


@pytest.mark.parametrize("found", ["notes.txt", "part/mine.txt", "link"])
def test_what_no_export_wrote_is_never_replaced(tmp_path: Path, found: str) -> None:
    out = tmp_path / "out"
    _write(out, "one")
    path = out / found
    path.symlink_to("/nowhere") if found == "link" else path.write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {found}, which no export wrote"):
        _write(out, "two")
    assert (out / "part" / "model.bin").read_text() == "one"
    assert os.path.lexists(path)


def test_what_comes_while_it_is_made_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"late\.txt"), aside(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "late.txt").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        _write(tmp_path / "file", "one")
    with pytest.raises(InputError, match="cannot write there"):
        _write(tmp_path / "file" / "out", "one")
    _write(tmp_path / "out", "one")
    (tmp_path / "out" / RECORD).write_text("{}")
    with pytest.raises(CorruptError, match=RECORD):
        _write(tmp_path / "out", "two")


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "part" / "model.bin").read_text() == "one"


def test_names_that_are_patterns(tmp_path: Path) -> None:
    for _ in range(2):
        _write(tmp_path / "[a]*", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["[a]*"]


KILLED = """
import sys, time
from pathlib import Path
from crosstill.export.export_folder import aside
with aside(Path(sys.argv[1])) as new:
    (new / "half").touch()
    print("writing", flush=True)
    time.sleep(60)
"""


def _begun(out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_two_at_a_time_and_what_a_kill_leaves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(tmp_path / "a-out", "another")
    process = _begun(out)
    with pytest.raises(LockedError, match="another process is exporting"):
        _write(out, "one")
    _write(tmp_path / "b", "elsewhere")  # other places are not held up
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert [p for p in tmp_path.iterdir() if p.name.startswith(files.TEMPORARY)]
    _write(out, "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-out", "b", "out"]


def _replace(out: Path, enough: Event) -> None:
    for number in count():
        if enough.is_set():
            return
        _write(out, str(number))


def test_readers_always_find_one_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _write(out, "start")
    fork, seen = multiprocessing.get_context("fork"), set()
    enough = fork.Event()
    writer = fork.Process(target=_replace, args=(out, enough))
    writer.start()

    def look() -> bool:
        assert out.exists()
        with suppress(FileNotFoundError):  # the old one may go between its folder and its file
            seen.add((out / "part" / "model.bin").read_text())
        return len(seen) > 9

    try:
        wait_for(look, pause=0)
    finally:
        enough.set()
        writer.join()
    assert writer.exitcode == 0
