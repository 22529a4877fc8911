import json
import subprocess
import sys

import pytest

from crosstill import files
from crosstill.errors import CorruptError, InputError, LockedError


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "a"
    files.write_bytes(target, b"old")

    def fail(path):
        path.write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_atomic(target, fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_library_wrote_beside_its_path_is_swept(tmp_path):
    """safetensors writes to `.tmpXXXXXX` beside the path that it is given, then renames."""
    code = (
        "import os, signal, sys; from pathlib import Path; from crosstill import files\n"
        "def write(path):\n"
        " (path.parent / '.tmpAbCdEf').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_atomic(Path(sys.argv[1]) / 'weights', write)"
    )
    (tmp_path / "other").touch()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    files.sweep(tmp_path, "weigh")  # of another file
    assert len(list(tmp_path.iterdir())) == 2
    files.sweep(tmp_path, "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_sealed_json_notices_any_change_and_newer_formats(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, files.sealed({"format": 1, "rows": 12}))
    assert files.read_sealed(path, {1})["rows"] == 12
    path.write_text(path.read_text().replace("12", "13"))
    with pytest.raises(CorruptError, match=r"a\.json: its checksum"):
        files.read_sealed(path, {1})
    files.write_json(path, files.sealed({"format": 2}))
    with pytest.raises(CorruptError, match="format 2 is unknown.*upgrade"):
        files.read_sealed(path, {1})


def test_every_bit_of_a_sealed_file_counts(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, files.sealed({"format": 1, "name": "x", "rows": [1, 2]}))
    whole = path.read_bytes()
    content = json.loads(whole)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            # a flip may turn one kind of white space into another, and nothing else
            assert files.read_sealed(path, {1}) == content
        except CorruptError as error:
            assert str(path) in str(error)


def test_a_lock_names_its_live_owner_and_dies_with_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from crosstill import files\n"
        "with files.locked(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {owner.pid} on"), files.locked(tmp_path):
            pass
        owner.kill()
    with files.locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file.*cannot write there"):
        files.writable_folder(tmp_path / "file")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_filled_aside_takes_the_place_of_another_or_leaves_it(
    tmp_path, monkeypatch, exchanges
):
    """Also on disks that cannot exchange two folders in one step."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    place, new, old = (tmp_path / name for name in ("place", "new", "old"))
    for text in ("one", "two"):
        new.mkdir()  # as a kill leaves it
        (new / "rubbish").touch()
        with files.filled_aside(place, new, old) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text(text)
        assert (place / "inner" / "file").read_text() == text
        assert list(tmp_path.iterdir()) == [place] and len(list(place.iterdir())) == 1
    with pytest.raises(KeyboardInterrupt), files.filled_aside(place, new, old):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [place]
    assert (place / "inner" / "file").read_text() == "two"


def test_files_have_the_permissions_that_the_user_asked_for(tmp_path):
    """The mask is that of the first write, not of the import."""
    script = (
        "import os\n"
        "from crosstill import files\n"
        "os.umask(0o027)\n"
        f"files.write_bytes(files.Path({str(tmp_path)!r}) / 'x', b'')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
