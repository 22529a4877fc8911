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

from crosstill import files
from crosstill.search.index_folder import verify
from support import PATIENCE, flip, wait_for
from verbs import crosstill, refusal

NONE = "this model knows none of these words"
CUT = "only the first 28 tokens of this query count"


@pytest.fixture
def own(index_folder, tmp_path) -> Path:
    """A copy of the index that a test may damage."""
    return Path(shutil.copytree(index_folder, tmp_path / "index"))


def test_from_a_folder_to_a_hit(bundle_folder, photos, tmp_path):
    out = tmp_path / "index"
    (tmp_path / "photos").mkdir()
    for name in sorted(os.listdir(photos))[:12]:
        shutil.copy(photos / name, tmp_path / "photos")
    (tmp_path / "photos/bad.jpg").write_bytes(b"no image")
    first = crosstill("index", bundle_folder, tmp_path / "photos", "--out", out)
    assert first.stdout.startswith(
        f"{out}: 12 photos; files: 12 new, 0 unchanged, 0 changed, 0 moved, 0 deleted, "
        "1 left out; 12 encoded in "
    )
    assert f"unreadable images left out: 1, listed in {out}/quarantine.jsonl" in first.stderr
    again = crosstill("index", bundle_folder, tmp_path / "photos", "--out", out, "--json")
    found = json.loads(again.stdout)
    assert (found["photos"], found["unchanged"], found["encoded"]) == (12, 12, 0)
    name = sorted(os.listdir(photos))[5]
    table = crosstill("search", out, "--image", photos / name, "--top", "3").stdout.splitlines()
    assert table[0] == "score  photo" and len(table) == 4
    assert table[1] == f"1.000  {name}"
    whole = crosstill("index", "verify", out).stdout
    assert whole == f"{out}: whole; 12 photos\n"


def test_words_photos_and_both(index_folder, photos):
    name = sorted(os.listdir(photos))[0]

    def hits(*arguments: object) -> dict[str, float]:
        found = json.loads(crosstill("search", index_folder, *arguments, "--json").stdout)
        return {hit["path"]: hit["score"] for hit in found["results"]}

    words, photo = hits("a red circle", "--top", 40), hits("--image", photos / name, "--top", 40)
    both = hits("a red circle", "--image", photos / name, "--top", 40)
    assert len(words) == len(photo) == len(both) == 40
    assert next(iter(photo)) == name
    assert list(words.values()) == sorted(words.values(), reverse=True)
    # the sum of two unit vectors, brought to unit length
    scale = both[name] / (words[name] + photo[name])
    for path in both:
        assert both[path] == pytest.approx(scale * (words[path] + photo[path]), abs=1e-4)
    assert len(hits("a red circle")) == 10


@pytest.mark.parametrize(
    ("query", "notes"),
    [
        ("a red circle", []),
        ("a red \U0001f436", []),
        ("\U0001f436", [NONE]),
        ("\u72d7 \u0441\u043e\u0431\u0430\u043a\u0430", [NONE]),
        ("x" * 120, [NONE]),
        ("\u200b", [NONE]),
        ("a red circle " * 9 + "a", []),
        ("a red circle " * 9 + "a red", [CUT]),
        ("\U0001f436 " * 29, [NONE, CUT]),
    ],
)
def test_words_that_count_for_nothing_are_said(index_folder, query, notes):
    text = crosstill("search", index_folder, query)
    assert text.stderr.splitlines() == [f"note: {note}" for note in notes]
    assert len(text.stdout.splitlines()) == 11
    found = crosstill("search", index_folder, query, "--json")
    assert json.loads(found.stdout)["notes"] == notes


def test_nothing_relevant_is_an_answer(index_folder):
    said = crosstill("search", index_folder, "a red circle", "--threshold", "0.99")
    assert said.stdout == "nothing relevant: no photo scores 0.990 or more\n"
    found = json.loads(
        crosstill("search", index_folder, "a red circle", "--threshold", "1", "--json").stdout
    )
    assert found == {"threshold": 1.0, "notes": [], "results": []}
    auto = json.loads(
        crosstill("search", index_folder, "a circle", "--threshold", "auto", "--json").stdout
    )
    assert -1 < auto["threshold"] < 1
    assert all(hit["score"] >= auto["threshold"] for hit in auto["results"])


def test_names_are_printed_escaped(bundle_folder, photos, tmp_path):
    name = os.fsdecode(b"\x1b[31m\xff\nred.png")
    (tmp_path / "photos").mkdir()
    shutil.copy(photos / sorted(os.listdir(photos))[0], tmp_path / "photos" / name)
    crosstill("index", bundle_folder, tmp_path / "photos", "--out", tmp_path / "index")
    table = crosstill("search", tmp_path / "index", "a red circle").stdout.splitlines()
    assert len(table) == 2 and table[1].endswith(r"  \x1b[31m\xff\nred.png")
    found = json.loads(crosstill("search", tmp_path / "index", "x", "--json").stdout)
    assert found["results"][0]["path"] == name


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("x", "--top", "0"), "--top 0: give a number from 1 to 1000"),
        (("x", "--top", "1001"), "--top 1001: give a number from 1 to 1000"),
        ((), "nothing to search for; give words, or --image"),
        (("",), "the query is empty"),
        ((" \n",), "the query is empty"),
        (("x", "--threshold", "high"), "--threshold high: give a score from -1 to 1, or auto"),
        (("x", "--threshold", "nan"), "--threshold nan: give a score"),
        (("x", "--threshold", "2"), "--threshold 2: give a score"),
        (("--image", "README.md"), "README.md: not an image"),
        (("--image", "/nowhere.jpg"), "/nowhere.jpg: no such file"),
        (("--image", "/tmp"), "/tmp: Is a directory"),
        (("--image", "x.jpg", "--threshold", "auto"), "--threshold auto: is calibrated for words"),
    ],
)
def test_queries_that_cannot_be(index_folder, arguments, match, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert match in refusal("search", index_folder, *arguments)


def test_what_is_no_index(tmp_path, bundle_folder):
    assert "no such index; make one with" in refusal("search", tmp_path / "nowhere", "x")
    assert "no index; make one with" in refusal("search", bundle_folder, "x")
    assert "no index; make one with" in refusal("index", "verify", tmp_path)


def test_another_bundle(index_folder, bundle_folder, photos, tmp_path, own):
    other = Path(shutil.copytree(bundle_folder, tmp_path / "other"))
    record = files.read_json(other / "bundle.json")
    record["identity"] |= {"tokenizer": "another"}
    files.write_json(other / "bundle.json", files.sealed(record))
    assert "not the same tokenizer" in refusal("search", index_folder, "x", "--bundle", other)
    said = refusal("index", other, photos, "--out", own)
    assert "not the same tokenizer" in said and said.endswith("with --rebuild")
    assert "40 encoded" in crosstill("index", other, photos, "--out", own, "--rebuild").stdout
    (other / "text.onnx").unlink()
    assert "half a bundle" in refusal("index", other, photos, "--out", own)
    assert "half a bundle" in refusal("search", index_folder, "x", "--bundle", other)


def test_folders_and_options_that_cannot_be(bundle_folder, photos, tmp_path, own):
    (tmp_path / "empty").mkdir()
    index = ("index", bundle_folder)
    assert "no photo in it" in refusal(*index, tmp_path / "empty", "--out", tmp_path / "i")
    assert "no such folder" in refusal(*index, tmp_path / "nowhere", "--out", tmp_path / "i")
    assert "--workers 0" in refusal(*index, photos, "--out", own, "--workers", "0")
    assert "no Milvus" in refusal(*index, photos, "--out", own, "--milvus", "here")
    assert "takes no option" in refusal("index", "verify", own, "--rebuild")
    crosstill("index", bundle_folder, photos, code=2)  # --out is missing
    with files.locked(own):
        assert "in use by process" in refusal(*index, photos, "--out", own)
        assert "in use by process" in refusal("index", "verify", own)
        crosstill("search", own, "a circle")


def test_damage_is_named_with_the_command_that_mends_it(own, photos, bundle_folder):
    path = max(own.glob("g-*/vectors.faiss"))
    path.write_bytes(path.read_bytes()[:100])
    said = crosstill("search", own, "x", code=1).stderr
    assert (
        said
        == f"error: {path}: its checksum is wrong; run `crosstill index` again, which mends it\n"
    )
    checked = crosstill("index", "verify", own, code=1)
    assert str(path) in checked.stdout
    command = checked.stderr.strip().partition("mend it with: crosstill ")[2]
    crosstill(*command.split())
    assert "whole; 40 photos" in crosstill("index", "verify", own).stdout


def test_photos_that_are_gone_are_listed(bundle_folder, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    crosstill("index", bundle_folder, tmp_path / "photos", "--out", tmp_path / "index")
    (tmp_path / "photos" / sorted(os.listdir(photos))[0]).unlink()
    checked = crosstill("index", "verify", tmp_path / "index")
    assert "whole; 40 photos, 1 gone\n" in checked.stdout
    assert "000000.png: No such file" in checked.stdout and "crosstill index" in checked.stderr
    found = json.loads(crosstill("index", "verify", tmp_path / "index", "--json").stdout)
    assert found["problems"] == [] and len(found["outdated"]) == found["gone"] == 1
    shutil.rmtree(tmp_path / "photos")
    checked = crosstill("index", "verify", tmp_path / "index")
    assert checked.stdout.splitlines() == [
        f"{tmp_path}/photos: all 40 photos in it are gone",
        f"{tmp_path}/index: whole; 40 photos, 40 gone",
    ]


ALONE = """
import sys
from pathlib import Path
from crosstill.cli import index, search
bundle, photos, out = map(Path, sys.argv[1:])
index.command(bundle, folder=photos, out=out)
search.command(out, "a red circle")
index.command("verify", folder=out)
assert not {"torch", "transformers", "pyarrow"} & set(sys.modules)
"""


def test_no_torch_is_needed(bundle_folder, photos, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, bundle_folder, photos, tmp_path / "index"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "whole; 40 photos" in done.stdout


@pytest.mark.slow
def test_what_verify_advises_mends_any_flipped_bit(bundle_folder, photos, own, tmp_path):
    """120 of them, spread over all files of an index; the advised command is run as it stands."""
    (tmp_path / "photos").mkdir()
    for name in sorted(os.listdir(photos)):
        shutil.copy(photos / name, tmp_path / "photos")
        (tmp_path / "photos" / name).with_suffix(".txt").write_text(f"the scene of {name}")
    (tmp_path / "photos/bad.jpg").write_bytes(b"no image")
    index, draw = tmp_path / "i", np.random.default_rng(0)
    crosstill("index", bundle_folder, tmp_path / "photos", "--out", index)
    expected = crosstill("search", index, "a red circle", "--top", 40, "--json").stdout
    whole = tmp_path / "whole"
    shutil.copytree(index, whole)
    names = [path.relative_to(index) for path in index.rglob("*") if path.is_file()]
    unchecked = (".lock", "README.md", "quarantine.jsonl")
    names = [name for name in names if name.name not in unchecked]
    unseen = []
    for number in range(120):
        shutil.rmtree(index)
        shutil.copytree(whole, index)
        # the memory is the largest, and the one that readers do not check
        name = Path("work.sqlite") if number % 2 else names[number // 2 % len(names)]
        (index / name).write_bytes(flip((index / name).read_bytes(), draw))
        verdict = verify(index)
        if verdict.problems:
            assert any(name.name in line for line in verdict.problems), (name, verdict)
            words = shlex.split(verdict.mend)[1:]
        else:
            unseen.append(name.name)
            words = ["index", "BUNDLE", "FOLDER", "--out", str(index)]
        real = {"BUNDLE": bundle_folder, "FOLDER": tmp_path / "photos"}
        crosstill(*(real.get(word, word) for word in words))
        verified = crosstill("index", "verify", index).stdout
        assert verified == f"{index}: whole; 40 photos\n", (number, name)
        found = crosstill("search", index, "a red circle", "--top", 40, "--json").stdout
        assert found == expected, (number, name)
    assert set(unseen) <= {"work.sqlite"}, "of which most is empty"


SLOW = """
import time
from crosstill.cli import main
from crosstill.search import index_builder

class Slow(index_builder.Encoder):
    def encode_images(self, images):
        time.sleep(0.5)
        return super().encode_images(images)

index_builder.Encoder, index_builder.BATCH = Slow, 1
main()
"""


@pytest.mark.parametrize(
    ("asked", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, -15, marks=pytest.mark.slow)],
)
def test_asked_to_stop_it_goes_on_with_the_same_command(
    bundle_folder, photos, tmp_path, asked, code
):
    words = ["index", bundle_folder, photos, "--out", tmp_path / "index"]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, text=True
    )
    begun = tmp_path / "index/work.sqlite-wal"
    wait_for(lambda: begun.exists() or child.poll() is not None)
    child.send_signal(asked)
    _, stderr = child.communicate(timeout=PATIENCE)
    assert child.returncode == code and "Traceback" not in stderr
    if asked == signal.SIGINT:
        assert stderr.splitlines()[-1] == "interrupted; the same command goes on where it was"
    again = crosstill(*words)
    assert "40 photos; files: 40 new" in again.stdout
    assert "whole; 40 photos" in crosstill("index", "verify", tmp_path / "index").stdout


FULL = """
import resource, signal, sys
from crosstill.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.mark.parametrize(
    "limit", [0, 20_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (3000, 60_000))]
)
def test_a_full_disk_is_one_line_and_the_old_index_stays(
    bundle_folder, photos, own, tmp_path, limit
):
    """A limit on the size of files fails where a full disk does."""
    more = Path(shutil.copytree(photos, tmp_path / "more"))
    for number in range(200):
        data = f"P6 1 1 255\n{number:03}".encode()
        (more / f"{number}.ppm").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", FULL, "index", bundle_folder, more, "--out", own, str(limit)],
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert done.returncode in (1, 2), lines
    assert lines[-1].startswith(f"error: {own}") and "Traceback" not in done.stderr, lines
    assert ".writing-" not in lines[-1], lines
    assert "40 photos" in crosstill("index", "verify", own).stdout
    crosstill("index", bundle_folder, more, "--out", own)
    assert "whole; 240 photos" in crosstill("index", "verify", own).stdout
