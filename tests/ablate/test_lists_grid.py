"""Grids from a score cache: what they run, where they measure, and what they refuse."""

import json
import os
import queue
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ablate.scored import LISTS, score_cache
from crosstill import ablate, data, fusion, report, teachers
from crosstill.ablate import grid, plan
from crosstill.errors import ConfigError, MismatchError
from crosstill.evaluate.recall import chances, chances_of_scores, from_scores
from crosstill.fusion import lists
from crosstill.fusion.states import Sides
from crosstill.train import Run
from support import FAST
from verbs import crosstill, refusal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("scored")


@pytest.fixture(scope="module")
def scored(home):
    """320 scenes, 32 of them to validate, under a fusion teacher."""
    return score_cache(home, 320)


def fill(scored, out, **options) -> ablate.Table:
    return ablate.run("dcd", scored, out, changes=LISTS, **{"seeds": (0,), **options})


@pytest.fixture(scope="module")
def done(scored, home):
    return fill(scored, home / "grid"), home / "grid"


@pytest.fixture(scope="module")
def dual(scored, toml, home):
    return fill(scored, home / "dual", student=toml), home / "dual"


def logged(run) -> list[float]:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event["total"] for event in events if event["kind"] == "step"]


def test_two_by_two_with_half_of_the_teacher(done, scored):
    table, out = done
    assert [row.name for row in table.rows] == [
        "hardest + dynamic",
        "hardest + plain",
        "random + dynamic",
        "random + plain",
    ]
    assert table.rows[0].difference is None and table.reference == "hardest + dynamic"
    for row in table.rows:
        (run,) = row.runs
        assert Run(run).matcher.depth == 2
        assert row.rsum.mean == pytest.approx(Run(run).metrics["best"]["rsum"], abs=1e-6)
        assert row.paper is None and (row is table.rows[0]) == (row.difference is None)
    losses = [logged(row.runs[0]) for row in table.rows]
    assert len({tuple(totals) for totals in losses}) == 4
    assert "| paper* |" not in (out / "dcd.md").read_text()


def test_the_table_says_where_recall_was_measured(done, scored):
    table, out = done
    val = scored.split("val")
    listed, caveat = lists.ListedPairs(scored, val), scored.caveat(val)
    assert table.teacher.rsum == pytest.approx(listed.teacher_recall().rsum)
    assert table.teacher.rsum == Run(table.rows[0].runs[0]).metrics["teacher"]["rsum"]
    assert caveat in table.note and "not the whole split" in (out / "dcd.md").read_text()
    false = [scored.by_image.counts(val.images), scored.by_caption.counts(val.captions)]
    said = f"{false[0].mean():.1f} captions of an image and {false[1].mean():.1f} images"
    assert said in caveat
    sure = [(count < 10).mean() for count in false]
    assert sure[0] == 0 and f"100 for any model on the {sure[1]:.0%} of captions" in scored.caveat(
        val
    )


def test_the_teachers_own_answers_are_its_recall(scored):
    teacher, val = teachers.load(scored.teacher["source"]), scored.split("val")
    seen = lists.MatchedSplit(scored, val, Sides(teacher, scored, val, keep=False))
    answers = seen.answers(teacher)
    assert answers.rsum == pytest.approx(seen.recall(teacher).rsum)
    assert answers.rsum == pytest.approx(seen.teacher_recall().rsum)
    assert answers.image.shape == (32, 3) and answers.text.shape == (len(val.captions), 3)


def test_chances_of_scores_are_those_of_features_and_add_up_to_recall():
    random = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 4, generator=random) for n in (5, 10))
    owner = torch.arange(10) % 5
    for one, other in zip(
        chances(image, text, owner), chances_of_scores(image @ text.T, owner), strict=True
    ):
        assert torch.equal(one, other)
    scores = (image @ text.T).masked_fill(torch.rand(5, 10, generator=random) < 0.5, -torch.inf)
    scores[owner, torch.arange(10)] = 0.0
    found, recall = chances_of_scores(scores, owner), from_scores(scores, owner)
    assert 100 * found[0].mean(0).tolist()[0] == pytest.approx(recall.i2t.r1)
    assert [100 * r for r in found[1].mean(0).tolist()] == pytest.approx([*recall.t2i.fair])


def test_a_finished_grid_runs_nothing_and_reads_the_same(done, scored, monkeypatch):
    table, out = done
    monkeypatch.setattr(grid, "train", None)
    assert fill(scored, out, student="half") == table
    assert ablate.read(out) == [table]


def test_the_report_of_the_grid(done):
    table, out = done
    page = report.write(out).read_text()
    assert table.title in page and "random + plain" in page and "not the whole split" in page
    assert "The teacher, meter, is the dashed line." in page


def test_dual_encoders_are_measured_in_the_whole_split(dual, scored):
    table, out = dual
    assert table.teacher is None and "candidates in the score cache" in table.note
    assert "whole split" not in table.note
    assert "teacher (" not in (out / "dcd.md").read_text()
    for row in table.rows:
        run = Run(row.runs[0])
        assert run.best.dim > 0
        assert row.rsum.mean == pytest.approx(run.metrics["best"]["rsum"])


def test_a_grid_that_was_stopped_ends_with_the_same_table(done, scored, tmp_path, monkeypatch):
    calls, real = iter(range(100)), lists.ListStream.batch
    out = Path(shutil.copytree(done[1], tmp_path / "grid"))
    for row in done[0].rows[2:]:
        shutil.rmtree(out / "runs" / row.runs[0].name)

    def dying(self, epoch, step):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return real(self, epoch, step)

    monkeypatch.setattr(lists.ListStream, "batch", dying)
    with pytest.raises(KeyboardInterrupt):
        fill(scored, out)
    monkeypatch.undo()
    assert [grid.finished(out, row.runs[0].name) for row in done[0].rows] == [True] * 3 + [False]
    assert ablate.markdown(fill(scored, out)) == ablate.markdown(done[0])


def test_a_worker_opens_a_score_cache_too(done, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_die_with", lambda parent: None)
    monkeypatch.setattr(grid.progress, "hide", lambda: None)
    monkeypatch.setattr(grid, "_here", {})
    places = queue.SimpleQueue()
    places.put("")
    stop = SimpleNamespace(is_set=lambda: False)
    grid._start(places, stop, os.getpid(), scored.folder, tmp_path)
    job = next(plan.make("dcd", scored, [], LISTS, [0]).jobs())
    assert grid._work(job) == pytest.approx(done[0].rows[0].rsum.mean)


def test_a_run_is_named_by_student_cache_and_settings(scored, home, toml):
    def key(*chosen, changes=LISTS):
        return next(plan.make("dcd", scored, chosen, changes, [0]).jobs()).key

    first = home / "first.toml"
    first.write_text('fusion = "cut"\nname = "half"\nlayers = [0]\n')
    drawn = key(changes=[*LISTS, "drawn=5"])
    assert key() == key("half")
    assert len({key(), key(str(first)), key(toml), drawn}) == 4


def students(home, **described) -> list[str]:
    files = []
    for name, lines in described.items():
        files.append(str(home / f"{name}.toml"))
        (home / f"{name}.toml").write_text(f'fusion = "cut"\nname = "{name}"\n{lines}\n')
    return files


TOWERS = ("losses=dcd", "balance=fixed", *LISTS)


def test_other_tables_run_whose_rows_rank(scored, tmp_path):
    cuts = students(tmp_path, one="layers = [0]", two="layers = [0, 3]", last="layers = [3]")
    made = plan.make("towers", scored, cuts, TOWERS, [0])
    assert [job.row for job in made.jobs()] == ["one", "two", "last"]
    assert made.record["listed"] and "not the whole split" in made.record["note"]
    assert len({job.key for job in made.jobs()}) == 3
    assert all(job.settings.losses == {"dcd": {"hardest": 3}} for job in made.jobs())


def refused(table, cache, *words, chosen=(), changes=LISTS) -> None:
    with pytest.raises((ConfigError, MismatchError)) as caught:
        plan.make(table, cache, chosen, changes, [0])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_cache_of_the_other_kind_is_refused_in_one_line(scored, many, toml, tmp_path):
    for table in ("table2", "table4", "table10"):
        refused(table, scored, "score cache", "contrastive", "the table dcd", changes=FAST)
    refused("table6", scored, "score cache", chosen=["half"], changes=FAST)
    refused("dcd", many, "holds features", "make a score cache: crosstill cache TEACHER")
    refused("table10", many, "is a fusion model", "score cache", chosen=["half"], changes=FAST)
    unscored = fusion.build_scores(None, data.open("scenes:320"), tmp_path / "listed", false=8)
    refused("dcd", unscored, "made without a teacher", "crosstill cache TEACHER")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("negatives=random", "dcd varies that itself"),
        ("losses.dcd.variant=focal", "dcd varies that itself"),
        ("losses=cprd", "dcd varies that itself"),
        ("teacher=somewhere", "always keeps the hardest"),
        ("freeze=image", "half is a fusion model; use towers=frozen"),
        ("losses.dcd.hardest=30", "hardest = 30: only"),
        ("losses.cprd.hardest=3", "no row of dcd has that loss"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_run(scored, change, message):
    refused("dcd", scored, message, changes=[*LISTS, change])


def test_students_of_both_kinds_are_not_compared(scored, toml, tmp_path):
    (cut,) = students(tmp_path, one="layers = [0]")
    refused("towers", scored, "one kind for all", chosen=[cut, toml, toml], changes=TOWERS)


def test_a_width_fits_scores_whatever_it_is(scored, toml, tmp_path):
    wide = tmp_path / "wide.toml"
    with open(toml) as file:
        wide.write_text("dim = 48\n" + file.read())
    assert not plan.make("dcd", scored, [str(wide)], LISTS, [0]).record["listed"]


def test_a_plan_of_an_earlier_crosstill_is_planned_anew(scored, tmp_path):
    made = plan.make("dcd", scored, [], LISTS, [0])
    old = plan.Plan({k: v for k, v in made.record.items() if k != "listed"})
    old.save(tmp_path)
    made.save(tmp_path)
    assert plan.load(tmp_path / "dcd.json").record["listed"]


def test_the_verb(done, many, scored):
    table, out = done
    options = [part for change in LISTS for part in ("--set", change)]
    verb = ["ablate", "dcd", scored.folder, "--out", out, "--seeds", 1, *options]
    assert ablate.markdown(table).strip() == crosstill(*verb).stdout.strip()
    never = ["--out", out / "never"]
    assert "score cache" in refusal("ablate", "dcd", many.folder, *never)
    assert "the table dcd" in refusal("ablate", "table4", scored.folder, *never)
    assert not (out / "never").exists()
    assert len(list((out / "runs").iterdir())) == 4
