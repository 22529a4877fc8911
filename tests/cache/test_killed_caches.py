"""Caches whose builds were killed, through the command line: the bytes of builds that were not.

A build is killed as it opens a file for the n-th time: while it reads photos, while it writes a
shard, and between a shard and the journal that names it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crosstill import data, fusion, students, teachers
from crosstill.data import scenes as scenery
from support import small_config
from teachers import fusion_models
from verbs import crosstill

KILLED = """
import os, signal, sys
pattern, left = sys.argv[1], int(sys.argv[2])

def watch(event, arguments):
    global left
    # what a decode worker is sent goes through a descriptor, which is a number
    name = "" if isinstance(arguments[0], int) else os.fsdecode(arguments[0])
    if pattern in os.path.basename(name):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.argv = ["crosstill", *sys.argv[3:]]
from crosstill.cli import main
sys.addaudithook(lambda event, found: watch(event, found) if event == "open" else None)
main()
"""


def killed(pattern: str, count: int, command: list[object]) -> None:
    words = [sys.executable, "-c", KILLED, pattern, str(count), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def check(command: list[object], tmp_path: Path, *moments: tuple[str, int]) -> dict[str, bytes]:
    """Kill the build at each moment in turn; what ends well at last is compared."""
    crosstill(*command, "--out", tmp_path / "whole")
    for pattern, count in moments:
        killed(pattern, count, [*command, "--out", tmp_path / "cut"])
    crosstill(*command, "--out", tmp_path / "cut")
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name in whole:
        assert whole[name] == cut[name], name
    assert not [path for path in os.listdir(tmp_path / "cut") if path.startswith(".writing")]
    return whole


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """140 photos with a caption each, most of which the first of three shards asks for."""
    home = tmp_path_factory.mktemp("photos")
    scenery.write(home, 140)
    told = json.loads((home / "dataset.json").read_text())
    for image in told["images"]:
        del image["sentences"][1:]
    (home / "dataset.json").write_text(json.dumps(told))
    return home / "dataset.json"


# while photos are read for scores, after the first shard, before the journal names the second
MOMENTS = [(".png", 2 * 140 + 70), ("score-00001.npy", 1), ("building.json", 2)]
FEW = ["--false", 8, "--false-images", 1]


def teacher_of(photos: Path, family: str, folder: Path) -> Path:
    texts = [text for example in data.open(str(photos)).examples for text in example.captions]
    return fusion_models.save(family, folder, texts)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bridgetower", "vilt"])
def test_scores(photos, tmp_path, family):
    teacher = teacher_of(photos, family, tmp_path / "teacher")
    made = check(["cache", teacher, photos, *FEW], tmp_path, *MOMENTS)
    assert len([name for name in made if name.startswith("score-")]) == 3


def test_texts_share_the_passes_of_a_build_that_was_not_stopped(photos, tmp_path, monkeypatch):
    """The last bits of a text's states depend on its pass, on some machines more than on others."""
    teacher, pairs = (
        teachers.load(teacher_of(photos, "vilt", tmp_path / "t")),
        data.open(str(photos)),
    )
    passes: list[tuple[str, ...]] = []
    states, match = teacher.text_states, teacher.score_pairs
    monkeypatch.setattr(
        teacher, "text_states", lambda texts: passes.append((*texts,)) or states(texts)
    )
    options = {"false": 8, "false_images": 1}
    fusion.build_scores(teacher, pairs, tmp_path / "whole", **options)
    whole, shards = set(passes), iter(range(2))

    def stop_at_the_third(*arguments):
        if next(shards, None) is None:
            raise KeyboardInterrupt
        return match(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher, "score_pairs", stop_at_the_third)
        fusion.build_scores(teacher, pairs, tmp_path / "cut", **options)
    passes.clear()
    fusion.build_scores(teacher, pairs, tmp_path / "cut", **options)
    assert passes and set(passes) <= whole
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """So many photos that three views of each, and their captions, take several shards."""
    home = tmp_path_factory.mktemp("many")
    scenery.write(home / "photos", 700)
    return home / "photos/dataset.json"


def dual(place: Path, listing: Path, dim: int) -> Path:
    texts = [text for example in data.open(str(listing)).examples for text in example.captions]
    students.build(small_config(), dim=dim, captions=texts).save(place)
    return place


@pytest.mark.slow
def test_features_of_several_views_and_joined_ones(many, tmp_path):
    moments = [
        (".png", 500),
        ("image-00001.npy", 1),
        ("building.json", 3),
        ("text-00001.npy", 1),
        ("views.parquet", 1),
        ("cache.json", 1),
    ]
    for dim in (16, 24):
        (tmp_path / str(dim)).mkdir()
        teacher = dual(tmp_path / f"teacher-{dim}", many, dim)
        check(["cache", teacher, many, "--views", 3], tmp_path / str(dim), *moments)
    parts = [tmp_path / "16/whole", tmp_path / "24/whole"]
    (tmp_path / "joined").mkdir()
    check(["join", *parts], tmp_path / "joined", *moments[1:])


def test_photos_without_captions_and_texts_without_photos(photos, tmp_path):
    """Captions and loose texts share shards: a kill between two, and before their table."""
    told = json.loads(photos.read_text())
    for image in told["images"][:100]:
        image["sentences"] = []
    mixed, lines = photos.parent / "mixed.json", tmp_path / "lines.txt"
    mixed.write_text(json.dumps(told))
    lines.write_text("\n".join(f"a red circle number {number}" for number in range(4200)))
    teacher = dual(tmp_path / "teacher", mixed, 16)
    moments = [("text-00001.npy", 1), ("texts.parquet", 1)]
    made = check(["cache", teacher, mixed, "--texts", lines], tmp_path, *moments)
    assert len([name for name in made if name.startswith("text-")]) == 3
