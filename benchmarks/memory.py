"""Peak memory of a DCD step: F = 63 candidates judged, h = 7 kept, over training on all 64.

Each step runs in a fresh process; what counts is how far the step raises the process's peak
resident memory. The teacher scores 63 drawn captions of each of 16 images without a graph, and
only (7 + 1) x 16 pairs go through the student with one.

    python -m benchmarks.memory
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from crosstill import cache, data, fusion, students
from crosstill.students.student_config import FusionConfig
from crosstill.train import TrainConfig, step
from crosstill.train.task import open_task

SCENES, IMAGES, FALSE, KEPT = 100, 16, 63, 7
SHAPE = {"layers": 4, "width": 256, "heads": 4, "mlp": 1024, "dropout": 0.0}


def prepare(place: Path) -> None:
    """A METER-shaped teacher on small towers, and scenes with candidates to choose from."""
    counts = {"false": FALSE, "false_images": FALSE}
    listed = fusion.build_scores(None, data.open(f"scenes:{SCENES}"), place / "listed", **counts)
    students.build("tiny-teacher", dim=64, captions=listed.texts).save(place / "dual")
    towers = FusionConfig(fusion="meter", towers=str(place / "dual"), shape=SHAPE)
    fusion.build(towers).save(place / "teacher")


def peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def one(place: Path, kind: str) -> int:
    """How many bytes a step of that kind adds to the peak."""
    torch.set_num_threads(1)
    listed = cache.open(place / "listed")
    judged = kind == "dcd"
    losses: dict[str, dict[str, Any]] = {"info_nce": {"hardest": FALSE}}
    if judged:
        losses = {"dcd": {"hardest": KEPT, "directions": "image"}}
    config = TrainConfig(
        recipe=kind,
        losses=losses,
        balance={"name": "fixed"},
        batch_size=IMAGES,
        teacher=str(place / "teacher") if judged else None,
        drawn=FALSE,
    )
    student = fusion.build("half", teacher=str(place / "teacher"))
    task = open_task(listed, config)
    task.fit(student)
    task.start(student)
    optimizer = step.build_optimizer((student, task.losses), task.balance, config)
    _, batch, _ = next(task.batches(0, 0))
    if not judged:  # captions of each image only, as above
        batch.lists.pop("text")
    before = peak()
    task.backward(batch)
    optimizer.step()
    return peak() - before


def main() -> dict[str, float]:
    """Measure both in processes of their own, print one line, and return the figures."""
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        command = [sys.executable, "-m", "benchmarks.memory", place]
        found = {
            kind: float(subprocess.run([*command, kind], check=True, capture_output=True).stdout)
            for kind in ("dcd", "all")
        }
    found["ratio"] = found["dcd"] / found["all"]
    sizes = ", ".join(f"{kind} {found[kind] / 2**20:.0f} MiB" for kind in ("dcd", "all"))
    print(f"{'memory':8} {found['ratio']:.3f}  (wanted at most 0.3 of all 64 pairs)  {sizes}")
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(one(Path(sys.argv[1]), sys.argv[2]))
    else:
        main()
