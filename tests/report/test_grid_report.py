"""The report of a grid: tables made by hand over small logs, and one real grid."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from pages import ATTACK, Page

from crosstill import ablate, report
from crosstill.ablate import plan
from crosstill.ablate.tables import Cell, Row, Table, latex, markdown
from crosstill.errors import InputError
from crosstill.evaluate.bootstrap import Difference
from crosstill.evaluate.recall import retrieval
from crosstill.report import pages
from support import FAST
from verbs import TOML, crosstill

WEIGHTS = {"fixed": 1.0, "dwa": 1.25, "dsmd": 40.0}


def logged(folder: Path, seed: int, weight: float, steps: int = 6) -> Path:
    """A run folder that holds nothing but its log."""
    folder.mkdir(parents=True)
    losses = {"feature": 0.5, "contrastive": 3.0}
    lines = [
        {
            "kind": "step",
            "step": step,
            "losses": {name: value / step for name, value in losses.items()},
            "weights": {name: weight * step for name in losses},
        }
        for step in range(1, steps + 1)
    ]
    lines += [{"kind": "epoch", "epoch": e, "val": {"rsum": 100 + 10 * seed + e}} for e in (1, 2)]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def row(name: str, runs: tuple[Path, ...], reference: bool) -> Row:
    cells = tuple(Cell(10.0 + k, 0.5) for k in range(6))
    difference = None if reference else Difference(-1.5, -3.0, -0.25, 0.01)
    return Row(name, cells, Cell(75.0, 1.25), difference, 528.8, runs, 2.0)


def handmade(home: Path) -> list[Table]:
    """Three balancers, two seeds; and ten rows of one run, which they share."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(12, 8, generator=random), torch.randn(12, 8, generator=random)
    runs = {
        name: tuple(logged(home / f"runs/{name}{s}", s, weight) for s in (0, 1))
        for name, weight in WEIGHTS.items()
    }
    rows = tuple(row(name, found, name == "dsmd") for name, found in runs.items())
    teacher = retrieval(*features, torch.arange(12))
    settings = {"epochs": 2, "losses": {"feature": {"side": "both"}}}
    shared = dict(teacher=teacher, teacher_name="big", split="val", settings=settings)
    many = tuple(row(f"r{k} $x_1$", runs["dsmd"], k == 0) for k in range(10))
    return [
        Table(
            "table5", "Balancers", ATTACK, "dsmd", rows, seeds=(0, 1), command="go <5>", **shared
        ),
        Table("table4", "Many", "", "r0", many, seeds=(0, 1), command="go 4", **shared),
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("handmade")


@pytest.fixture(scope="module")
def tables(home) -> list[Table]:
    return handmade(home)


@pytest.fixture(scope="module")
def shown(tables, home) -> Page:
    return Page(pages.write_tables(tables, "Grid: mine", home / "out").read_text())


def test_every_table_stands_on_the_page_with_its_legend_settings_and_command(tables, shown):
    for table in tables:
        for cells in table.cells()[1]:
            assert " ".join(cells) in shown.text
    assert "2 tables from 6 runs" in shown.text
    assert ATTACK in shown.text and "go <5>" in shown.text and "go 4" in shown.text
    assert "losses.feature.side both" in shown.text
    assert not {"script", "link"} & {tag for tag, _ in shown.elements}


def test_the_files_beside_it_are_the_tables(tables, shown, home):
    out = home / "out"
    assert (out / "table.md").read_text() == "\n".join(map(markdown, tables))
    assert (out / "table.tex").read_text() == "\n".join(map(latex, tables))
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["tables"] == [json.loads(json.dumps(t.to_json())) for t in tables]


def test_bars_have_the_figures_and_the_teachers(tables, shown):
    alts = [image["alt"] for image in shown.all("img")]
    bars = [alt for alt in alts if alt.startswith("RSUM of each row")]
    assert len(bars) == 2
    assert "fixed 75.00 ± 1.25; dwa" in bars[0]
    assert f"The teacher's is {tables[0].teacher.rsum:.2f}" in bars[0]


def test_rsum_curves_are_means_over_seeds(shown):
    alts = [image["alt"] for image in shown.all("img") if "after each epoch" in image["alt"]]
    assert len(alts) == 3 + 10
    # 100 + 10 * seed + epoch, after epoch 2: the mean of 102 and 112
    assert alts[0] == "RSUM after each epoch of fixed, mean of 2 seeds: 107.00 after the last."


def test_losses_and_weights_are_shown_for_few_rows(shown):
    alts = [image["alt"] for image in shown.all("img")]
    losses = [alt for alt in alts if alt.startswith("The losses of")]
    weights = [alt for alt in alts if alt.startswith("The weights of")]
    assert len(losses) == len(weights) == 3  # none for the table of ten rows
    assert "feature from 0.5 to 0.0833; contrastive from 3 to 0.5" in losses[0]
    assert "feature from 40 to 240" in weights[2]
    assert len({alt.partition(" over ")[2] for alt in weights}) == 3


def test_rows_share_one_axis(tables, monkeypatch):
    limits = []
    place = pages.curves.scale

    def note(axes, low, high, log):
        place(axes, low, high, log)
        limits.append((axes.get_title(loc="left").partition(":")[0], axes.get_ylim()))

    monkeypatch.setattr(pages.curves, "scale", note)
    logs = {r.name: [pages._log(r, run) for run in r.runs] for r in tables[0].rows}
    pages._losses_and_weights(logs, seed=0)
    assert len(limits) == 12 and len(set(limits)) == 2
    (_, (low, high)) = next(found for found in limits if found[0] == "weights")
    assert low < 1 and high > 240


def test_a_run_that_is_gone_is_named(tmp_path):
    tables = handmade(tmp_path)
    shutil.rmtree(tables[0].rows[1].runs[1])
    with pytest.raises(InputError, match=r"runs/dwa1: the run of 'dwa' is gone; `crosstill abl"):
        pages.write_tables(tables, "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def grid(many, tmp_path_factory) -> Path:
    """A table of two rows, really run."""
    home = tmp_path_factory.mktemp("grid")
    (home / "small.toml").write_text(TOML)
    options = {"chosen": [str(home / "small.toml")], "changes": list(FAST), "seeds": (0,)}
    made = plan.make("table6", many, command="crosstill ablate table6", **options)
    ablate.fill(made, many, home / "grid")
    return home / "grid"


def test_a_real_grid(grid):
    path = grid / "report.html"
    assert crosstill("report", grid).stdout.strip() == str(path)
    (table,) = ablate.read(grid)
    text = Page(path.read_text()).text
    assert all(" ".join(cells) in text for cells in table.cells()[1])
    assert "crosstill ablate table6" in text
    report.write(grid)  # its own files do not disturb it
    assert re.search(r"^\*\*L2 normalisation\*\*", (grid / "table.md").read_text())


def test_a_grid_that_is_not_finished(grid, tmp_path):
    shutil.copytree(grid, tmp_path / "grid")
    next((tmp_path / "grid/runs").glob("*/done.json")).unlink()
    with pytest.raises(InputError, match="1 of 2 runs of table6 are not finished"):
        report.write(tmp_path / "grid")
