"""Makes the artefacts that later versions must still open, and packs them.

    python make.py HOME

HOME becomes a folder of caches, runs (finished and killed), a bundle, an index and a grid, and
artefacts.tar.xz beside this script holds what the tests need of it. It is run once, before code
moves: artefacts that the moved code makes prove nothing about those that users have.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402

torch.set_num_threads(1)

from crosstill import data, fusion, teachers  # noqa: E402
from crosstill.cache import build, join  # noqa: E402
from crosstill.data import scenes  # noqa: E402
from crosstill.fusion.scores import build_scores  # noqa: E402
from fusion.listed import SHAPE, meter_config, parameters  # noqa: E402
from support import SmallTeacher, small_student  # noqa: E402
from verbs import TOML, crosstill  # noqa: E402

SETTINGS = ["epochs=2", "steps_per_epoch=10", "batch_size=8", "lr=1e-3", "log_every=1"]
PLAIN = ["center=false"]
KEEP = ["save_every=4", "keep=2"]
LISTS = ["losses.dcd={hardest=3}"]  # not calibrated
MARGIN = ["losses.hard_negative.margin=0"]
QUEUE = ["losses.contrastive.queue_size=24"]
# the words after `crosstill train`: cache, recipe, student, changes
RUNS: dict[str, tuple[str, str, str, list[str]]] = {
    "dsmd": ("features", "dsmd", "small.toml", [*QUEUE, *MARGIN]),
    "clip_kd": ("features", "clip_kd", "small.toml", []),
    "dcd": ("scores", "dcd", "small.toml", LISTS),
    "meter": ("scores", "dcd", "meter.toml", LISTS),
    "joined-run": ("joined", "dsmd", "small.toml", [*QUEUE, *MARGIN, "balance=uncertainty"]),
}
DEATH = 17  # the step before which a killed run died


def words(home: Path, name: str) -> list[str]:
    """Return the words after `crosstill train` of one of the runs."""
    cache, recipe, student, changes = RUNS[name]
    every = [*SETTINGS, *PLAIN, *KEEP, *changes]
    typed = [str(home / cache), "--student", str(home / student), "--recipe", recipe]
    return [*typed, *(word for change in every for word in ("--set", change))]


def make_caches(home: Path) -> None:
    pairs = data.open("scenes:30")
    narrow = build(SmallTeacher(), pairs, home / "features")
    wide = build(SmallTeacher(dim=24, weights=1), pairs, home / "wide")
    join([narrow, wide], home / "joined", [3, 1])
    build(SmallTeacher(), pairs, home / "views", views=2)
    small_student(narrow).save(home / "dual")
    meter = fusion.build(meter_config(home / "dual", layers=2), seed=1)
    with torch.no_grad():
        for weight in parameters(meter, "fusion"):
            weight.mul_(4)
    meter.save(home / "fusion")
    build_scores(teachers.load(home / "fusion"), pairs, home / "scores", false=8, false_images=4)


def make_students(home: Path) -> None:
    (home / "small.toml").write_text(TOML)
    shape = "\n".join(f"{key} = {value}" for key, value in {**SHAPE, "dropout": 0.1}.items())
    text = f'fusion = "meter"\nname = "meter"\ntowers = "{home / "dual"}"\n[shape]\n{shape}\n'
    (home / "meter.toml").write_text(text)


def make_runs(home: Path) -> None:
    cases = [
        {
            "words": words(home, name),
            "out": str(home / (f"{name}-killed" if deaths else name)),
            "deaths": deaths,
            "finish": not deaths,
        }
        for name in RUNS
        for deaths in ([], [{"step": DEATH}])
    ]
    script = TESTS / "train/commanded_runs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = "".join(f"{json.dumps(case)}\n" for case in cases)
    subprocess.run([sys.executable, script], input=lines, text=True, env=environment, check=True)


def trim(home: Path) -> None:
    """Remove the older checkpoints of killed runs; resuming reads the newest."""
    for run in home.glob("*-killed"):
        newest = max((run / "checkpoints").iterdir()).stem
        for path in (run / "checkpoints").iterdir():
            if path.stem != newest:
                path.unlink()


def make_search(home: Path) -> None:
    scenes.write(home / "photos", 12, seed=1).unlink()
    crosstill("export", home / "dsmd", "--data", "scenes:30", "--out", home / "bundle")
    crosstill("index", home / "bundle", home / "photos", "--out", home / "index")


def grid(home: Path) -> list[object]:
    """Return the words of the command whose grid is kept."""
    changes = ["epochs=1", "steps_per_epoch=2", "batch_size=8", *QUEUE]
    sets = [word for change in changes for word in ("--set", change)]
    chosen = ["--student", home / "small.toml", "--seeds", "1", *sets]
    return ["ablate", "table6", home / "many", "--out", home / "grid", *chosen]


def make_grid(home: Path) -> None:
    build(SmallTeacher(), data.open("scenes:300"), home / "many")
    table = crosstill(*grid(home)).stdout
    (home / "grid.txt").write_text(table)


def is_kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out of the archive what no test reads: it would be most of it."""
    parts = Path(member.name).parts
    finished = parts[0] in RUNS or parts[0] == "grid"
    left_out = parts[0].endswith((".log", ".moments")) or (
        finished and ("checkpoints" in parts or "student" in parts[:2])
    )
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if left_out else member


def main(home: Path) -> None:
    home.mkdir()
    make_caches(home)
    make_students(home)
    make_runs(home)
    make_search(home)
    make_grid(home)
    trim(home)
    with tarfile.open(Path(__file__).with_name("artefacts.tar.xz"), "w:xz") as archive:
        for path in sorted(home.iterdir()):
            archive.add(path, path.name, filter=is_kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
