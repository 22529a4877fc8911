"""Parameters of several students against their recall, as a table and a picture.

All runs have to be of one teacher, whose size and recall are the measure. Needs '.[report]'.

    python -m benchmarks.sizes RUN... [--out PICTURE.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from crosstill import cache, formats
from crosstill.train import Run

Point = tuple[str, int, float]  # name, parameters, RSUM


def points(folders: list[Path]) -> tuple[Point, list[Point]]:
    """Return the teacher, and the students from large to small."""
    runs = [Run(folder) for folder in folders]
    teachers = {cache.open(run.config["cache"]["folder"]).teacher["parameters"] for run in runs}
    if len(teachers) != 1:
        raise SystemExit("error: runs of several teachers; give runs of one")
    teacher = ("teacher", teachers.pop(), runs[0].metrics["teacher"]["rsum"])
    students = [
        (run.folder.name, run.metrics["parameters"]["total"], run.metrics["best"]["rsum"])
        for run in runs
    ]
    return teacher, sorted(students, key=lambda student: -student[1])


def table(teacher: Point, students: list[Point]) -> str:
    """Write the table, with shares of the teacher's."""
    rows = [
        [name, f"{size:,}", f"{size / teacher[1]:.0%}", f"{rsum:.2f}", f"{rsum / teacher[2]:.1%}"]
        for name, size, rsum in (teacher, *students)
    ]
    return formats.markdown(["", "parameters", "of the teacher's", "RSUM", "of it"], rows)


def draw(teacher: Point, students: list[Point], path: Path) -> None:
    """Draw shares of the teacher's RSUM over shares of its parameters."""
    figure = Figure((6, 3.6), layout="constrained")
    axes = figure.subplots()
    every = (teacher, *students)
    across = [100 * size / teacher[1] for _, size, _ in every]
    up = [100 * rsum / teacher[2] for _, _, rsum in every]
    axes.plot(across[1:], up[1:], "o-", color="#1f6fb2")
    axes.plot(across[:1], up[:1], "D", color="#777777")  # the teacher
    for x, y, (_, size, rsum) in zip(across, up, every, strict=True):
        text = f"{size / 1e6:.1f} M\n{rsum:.0f}"
        axes.annotate(text, (x, y), (6, -4), textcoords="offset points", va="top")
    axes.set(xlabel="parameters, % of the teacher's", ylabel="RSUM, % of the teacher's")
    axes.set(xlim=(0, 115), ylim=(min(up) - 8, max(up) + 2))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the table, and draw the picture where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    teacher, students = points(given.runs)
    print(table(teacher, students))
    if given.out is not None:
        draw(teacher, students, given.out)


if __name__ == "__main__":
    main()
