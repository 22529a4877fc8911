"""The report of a small real run, read as a reader would, and every refusal."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pages import ATTACK, Page
from PIL import Image

from crosstill import data, files, report, students
from crosstill.cache import Cache, build
from crosstill.data import scenes as scenery
from crosstill.errors import ConfigError, CorruptError, DataError, InputError, MismatchError
from crosstill.evaluate import CachedSplit, likeness, retrieval, teacher_recall
from crosstill.formats import latex
from crosstill.report import curves, pages, pictures, run_results
from crosstill.train import Run, TrainConfig, train
from crosstill.train.config import parse
from crosstill.train.task import learnt_rows
from crosstill.types import Features
from support import SETTINGS, small_config, small_student
from verbs import crosstill


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Photos with one hostile caption, a teacher on disk, its cache, a finished run."""
    home = tmp_path_factory.mktemp("report")
    scenery.write(home / "photos", 60)
    listing = home / "photos/dataset.json"
    record = json.loads(listing.read_text())
    held = [image for image in record["images"] if image["split"] == "val"]
    for image in held:
        for sentence in image["sentences"]:
            sentence["raw"] = f"{ATTACK} {sentence['raw']}"
    listing.write_text(json.dumps(record))
    pairs = data.open(listing)
    texts = [text for example in pairs.examples for text in example.captions]
    students.build(small_config(), dim=16, captions=texts).save(home / "teacher")
    cache = build(students.load(home / "teacher"), pairs, home / "cache")
    settings = TrainConfig(**SETTINGS)
    train(small_student(cache), cache, settings, home / "run", command="crosstill train <it>")
    report.write(home / "run")
    return home


@pytest.fixture(scope="module")
def shown(home) -> Page:
    return Page((home / "run/report.html").read_text())


class Quiet(NamedTuple):
    """Where the verb wrote a report without latencies, what it printed, the summary before."""

    folder: Path
    printed: str
    summary: bytes


@pytest.fixture(scope="module")
def quiet(home, tmp_path_factory) -> Quiet:
    folder, summary = tmp_path_factory.mktemp("quiet"), (home / "run/metrics.json").read_bytes()
    told = crosstill("report", home / "run", "--out", folder, "--no-latency")
    return Quiet(folder, told.stdout.strip(), summary)


def copied(home: Path, tmp_path: Path) -> Path:
    """The run alone, to be damaged."""
    shutil.copytree(home / "run", tmp_path / "run")
    return tmp_path / "run"


def rewrite(run: Path, **changes: object) -> None:
    """Change the run's record as its owner could not by hand."""
    record = files.read_json(run / "config.json") | changes
    files.write_json(run / "config.json", files.sealed(record))


# --- what the page holds ---


def test_the_table_is_evaluates(home, shown):
    run, cache = Run(home / "run"), Cache(home / "cache")
    pairs = data.open(home / "photos/dataset.json").split("val")
    named = {
        "teacher (small)": teacher_recall(cache, cache.split("val")),
        "student (small)": retrieval(run.best, pairs).recall,
        "student, untrained": retrieval(run.untrained, pairs).recall,
    }
    markdown = (home / "run/table.md").read_text()
    latex = (home / "run/table.tex").read_text()
    figures = json.loads((home / "run/report.json").read_text())
    for (name, recall), role in zip(
        named.items(), ("teacher", "student", "untrained"), strict=True
    ):
        cells = [f"{n:.2f}" for n in (*recall.i2t.fair, *recall.t2i.fair, recall.rsum)]
        assert re.search(rf"\| {re.escape(name)} .*\| +" + r" \| +".join(cells), markdown)
        assert f"{name} & " in latex and " & ".join(cells) in latex
        assert f"{' '.join(cells)}" in shown.text
        assert recall.to_json().items() <= figures[role].items()
    assert shown.text.index("teacher (small)") < shown.text.index("student (small)")


def test_the_runs_own_summary_stays(home, quiet):
    assert quiet.summary == (home / "run/metrics.json").read_bytes()
    assert sorted(path.name for path in quiet.folder.iterdir()) == [
        "report.html",
        "report.json",
        "table.md",
        "table.tex",
    ]


def test_latency_of_both_is_measured_in_turn_unless_told_not_to(home, quiet):
    figures = json.loads((home / "run/report.json").read_text())
    assert figures["teacher"]["efficiency"]["image_ms"] > 0
    assert figures["student"]["efficiency"]["caption_ms"] > 0
    assert "efficiency" not in json.loads((quiet.folder / "report.json").read_text())["student"]


def test_the_summary_compares_student_and_teacher(home, shown):
    figures = json.loads((home / "run/report.json").read_text())
    student, teacher = figures["student"], figures["teacher"]
    assert f"{student['parameters'] / teacher['parameters']:.0%} of the teacher's" in shown.text
    assert f"{student['rsum'] / teacher['rsum']:.0%} of its RSUM" in shown.text


def test_sections_stand_in_their_order(shown):
    titles = "Recall|Learning curve|Losses|Weights|Feature space|What they find|How it was made"
    assert re.search(".*".join(titles.split("|")), shown.text)


def test_nothing_outside_of_the_page_is_asked_for(home, shown):
    """Neither by an attribute, nor by CSS, nor from inside of a picture."""
    text = (home / "run/report.html").read_text()
    assert not re.search(r"""(src|href|srcset)\s*=\s*["']?\s*(https?:)?//""", text)
    assert "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in shown.elements}
    pictures = [a["src"] for a in shown.all("img")] + [a["srcset"] for a in shown.all("source")]
    assert all(uri.startswith("data:image/") for uri in pictures)
    drawn = [uri for uri in pictures if uri.startswith("data:image/svg")]
    for uri in drawn:
        inside = base64.b64decode(uri.partition(",")[2]).decode()
        assert not re.search(r"""(href|src)=["'](?!#)""", inside)
    assert drawn


def test_captions_and_commands_are_text(home, shown):
    assert "<script" not in (home / "run/report.html").read_text()
    assert ATTACK in shown.text and "crosstill train <it>" in shown.text


def test_every_picture_has_words_and_both_colours(shown):
    assert all(len(image["alt"]) > 10 for image in shown.all("img"))
    sources = shown.all("source")
    assert len(sources) == 13  # RSUM, two mean cosines, four losses, four weights, two spaces
    assert all(s["media"] == "(prefers-color-scheme: dark)" for s in sources)
    light = [image["src"] for image in shown.all("img") if "width" in image]
    assert all(a != b["srcset"] for a, b in zip(light, sources, strict=True))


def test_every_loss_and_weight_has_its_curve(home, shown):
    lines = (home / "run/events.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    alts = [image["alt"] for image in shown.all("img")]
    for what, key in (("Loss", "losses"), ("Weight", "weights")):
        for name in steps[0][key]:
            values = [step[key][name] for step in steps]
            (alt,) = [alt for alt in alts if alt.startswith(f"{what} {name} ")]
            assert f"{len(steps)} logged steps" in alt
            for word in (values[0], values[-1], min(values), max(values)):
                assert f"{word:.4g}" in alt
    epochs = [line["val"]["rsum"] for line in map(json.loads, lines) if line["kind"] == "epoch"]
    (alt,) = [alt for alt in alts if alt.startswith("RSUM on val")]
    assert f"{epochs[-1]:.2f}, best {max(epochs):.2f}" in alt


def test_mean_cosines_stand_beside_the_teachers(home, shown):
    run = Run(home / "run")
    cache = learnt_rows(Cache(home / "cache"), parse(run.config["settings"]))
    split = cache.split("val")
    owner = torch.from_numpy(split.owner)
    teacher = likeness.mean_cosines(cache.split_features(split)._asdict(), owner)
    student = CachedSplit(cache, split, run.best).measure(run.best).cosines
    figures = json.loads((home / "run/report.json").read_text())["mean_cosine"]
    assert figures == {"teacher": pytest.approx(teacher), "student": pytest.approx(student)}
    for side, name in (("image", "photos"), ("text", "captions")):
        assert f"{name}: teacher {teacher[side]:.2f}, student {student[side]:.2f}" in shown.text
        (alt,) = [
            i["alt"] for i in shown.all("img") if i["alt"].startswith(f"Mean cosine of {name}")
        ]
        assert f"The teacher's is {teacher[side]:.2f}" in alt


def test_a_run_from_before_mean_cosines_is_shown_without_their_curves(home, tmp_path):
    run = copied(home, tmp_path)
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("mean_cosine", None), line.pop("teacher_mean_cosine", None)
    (run / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    summary = json.loads((run / "metrics.json").read_text())
    del summary["teacher_mean_cosine"], summary["best"]["mean_cosine"]
    (run / "metrics.json").write_text(json.dumps(summary))
    shown = Page(report.write(run, latency=False).read_text())
    assert len(shown.all("source")) == 11
    assert "Mean cosine between different ones" in shown.text


def test_ten_queries_with_what_both_models_find(home, shown):
    cache, run = Cache(home / "cache"), Run(home / "run")
    split = cache.split("val")
    assert len(shown.all("article")) == 10
    right = [item for item in shown.all("li") if item.get("class") == "right"]
    assert len(shown.all("li")) == 10 * 2 * 5
    assert len(right) == shown.text.count("✓") > 0
    # independently: the student's answers from its own embeddings of files
    seen = run_results.read(run.folder, latency=False).features
    asked = run_results.queries(cache, split, seen)
    texts = [cache.texts[row] for row in split.captions]
    assert [query.caption for query in asked][::9] == [texts[0], texts[-1]]
    for query in asked:
        row = texts.index(query.caption)
        for answer in query.answers:
            scores = (seen[answer.model].image @ seen[answer.model].text[row]).tolist()
            own = scores[split.owner[row]]
            assert answer.rank == 1 + sum(score > own for score in scores)
            marks = [photo.right for photo in answer.photos]
            assert marks == [place == answer.rank for place in range(1, 6)]


def test_photos_are_small_jpegs(shown):
    photos = [i["src"] for i in shown.all("img") if i["src"].startswith("data:image/jpeg")]
    assert len(photos) == 100
    opened = Image.open(io.BytesIO(base64.b64decode(photos[0].partition(",")[2])))
    assert max(opened.size) <= run_results.SIDE


def test_settings_versions_cache_and_licences_are_told(home, shown):
    record = Run(home / "run").config
    told = (str(home / "cache"), record["cache"]["digest"], record["versions"]["torch"])
    assert all(text in shown.text for text in told)
    assert "losses.contrastive.queue_size 50" in shown.text
    assert "balance.name dsmd" in shown.text
    assert "licence of the teacher not said" in shown.text


# --- the space ---


def rows(seed: int, images: int = 40, captions: int = 120, width: int = 6) -> Features:
    random = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, width + 1)
    return Features(
        torch.randn(images, width, generator=random) / spread,
        torch.randn(captions, width, generator=random) / spread,
    )


def test_both_models_share_the_axes_of_all_their_points():
    teacher, student = rows(0), rows(1)
    found = pictures.fit_space({"teacher": teacher, "student": student})
    points = torch.cat([*teacher, *student]).double().numpy()
    centred = points - points.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    for model, seen in (("teacher", teacher), ("student", student)):
        direct = (seen.image.double().numpy() - points.mean(0)) @ axes[:3].T
        np.testing.assert_allclose(abs(found.images[model]), abs(direct), atol=1e-9)
    everything = np.concatenate([*found.images.values(), *found.captions.values()])
    np.testing.assert_array_equal(found.limits[:, 0], everything.min(0))
    np.testing.assert_array_equal(found.limits[:, 1], everything.max(0))


def test_the_pictures_of_both_models_have_the_same_box(monkeypatch):
    boxes = []
    frame = pictures._frame

    def note(axes, limits, theme):
        frame(axes, limits, theme)
        boxes.append((axes.get_xlim(), axes.get_ylim(), axes.get_zlim(), axes.azim, axes.elev))

    monkeypatch.setattr(pictures, "_frame", note)
    pictures.draw_spaces(pictures.fit_space({"teacher": rows(0), "student": rows(1)}))
    assert len(boxes) == 4 and len(set(boxes)) == 1


def test_the_share_of_variance_is_one_where_three_axes_hold_all():
    flat = Features(*(torch.cat([side[:, :2], 0 * side[:, 2:]], 1) for side in rows(0)))
    assert pictures.fit_space({"teacher": flat}).explained["teacher"] == pytest.approx(1)
    whole = pictures.fit_space({"teacher": rows(0)}).explained["teacher"]
    assert 0.5 < whole < 0.99


def test_a_large_split_is_thinned_alike_for_both_and_always_in_the_same_way():
    seen = rows(0, images=50, captions=90)
    found = pictures.fit_space({"teacher": seen, "student": seen}, most=30)
    assert found.images["teacher"].shape == found.captions["student"].shape == (30, 3)
    np.testing.assert_array_equal(found.captions["teacher"], found.captions["student"])
    again = pictures.fit_space({"teacher": seen, "student": seen}, most=30)
    np.testing.assert_array_equal(found.images["teacher"], again.images["teacher"])


def test_features_of_two_dimensions_are_shown_too():
    assert pictures.fit_space({"student": rows(0, width=2)}).images["student"].shape == (40, 3)


# --- curves ---


def test_bins_hold_mean_and_extremes():
    curve = curves.Curve([1, 2, 3, 4], [1.0, 3.0, 10.0, 20.0])
    two = curves.bins(curve, 2)
    assert two.at.tolist() == [1.5, 3.5] and two.mean.tolist() == [2, 15]
    assert two.low.tolist() == [1, 10] and two.high.tolist() == [3, 20]
    assert curves.bins(curve, 9).mean.tolist() == curve.values


def test_the_mean_of_seeds_goes_as_far_as_the_shortest():
    found = curves.mean([curves.Curve([1, 2], [1.0, 2.0]), curves.Curve([1], [4.0])])
    assert (found.at, found.values) == ([1], [2.5])


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0.5, 0.6, True),
        (0.01, 90.0, True),
        (1.00001, 1.00003, False),
        (1.0, 1.0, True),
        (0, 3, False),
    ],
)
def test_an_axis_has_a_few_labels_and_no_two_alike(low, high, log):
    figure = Figure()
    axes = figure.add_subplot()
    pictures.scale(axes, low, high, log)
    below, above = axes.get_ylim()
    assert below < low and high < above
    figure.draw_without_rendering()
    labels = [
        tick.label1.get_text()
        for tick in axes.yaxis.get_major_ticks()
        if below <= tick.get_loc() <= above
    ]
    assert 2 <= len(labels) <= 7 and len(set(labels)) == len(labels)


# --- runs of other kinds ---


def test_a_run_without_a_teacher_is_shown_alone(tmp_path):
    cache = build(None, data.open("scenes:60"), tmp_path / "cache")
    settings = TrainConfig(**SETTINGS | {"losses": {"info_nce": {}}, "balance": "fixed"})
    settings = settings.changed(["epochs=1", "log_every=1000"])
    student = students.build(small_config(), dim=16, captions=cache.texts)
    train(student, cache, settings, tmp_path / "run")
    shown = Page(report.write(tmp_path / "run").read_text())
    assert "no teacher to compare it with" in shown.text
    assert "No teacher's row" in shown.text and "Made from Python" in shown.text
    assert len(shown.all("li")) == 50
    assert "No step was logged (log_every = 1000)" in shown.text


def test_a_teacher_that_is_gone_or_changed_is_said_to_be(home, tmp_path):
    run = copied(home, tmp_path)
    away = home / "teacher"
    try:
        away.rename(home / "away")
        notes = run_results.read(run, latency=True).notes
        gone = f"latency was not measured: {away} is not on this machine"
        assert any(gone in note for note in notes), notes
        other = students.build(small_config(), dim=16, captions=["other words"], seed=9)
        other.save(away)
        shown = Page(report.write(run).read_text())
        assert f"{away} has changed since it filled the cache" in shown.text
    finally:
        shutil.rmtree(away)
        (home / "away").rename(away)
    assert "ms/image" in shown.text  # the student's is measured all the same


def test_letters_that_are_no_utf8_do_not_stop_the_page(tmp_path):
    shown = pages.html("photo \udcff", "one", [pages.Section("x", [pages.Text("a\udcffb")])])
    made = pages.save(tmp_path, shown, {}, ("report.json", {"path": "\udcff"}))
    assert "a?b" in made.read_text(encoding="utf-8")


def test_latex_signs_are_escaped():
    cells = latex("a\nb", ["", "50 %"], [["a_b & c", "–"]])
    assert cells.splitlines()[0] == "% a b"
    assert r"a\_b \& c & -- \\" in cells and r"50 \%" in cells


# --- refusals, one line each ---


def refused(source: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        report.write(source, latency=False)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_that_is_neither(home, tmp_path):
    assert "neither a run nor a grid" in refused(tmp_path, InputError)
    assert "no such folder" in refused(tmp_path / "nowhere", InputError)
    assert "neither a run nor a grid" in refused(home / "teacher", InputError)


def test_a_run_that_is_not_finished(home, tmp_path):
    run = copied(home, tmp_path)
    (run / "metrics.json").unlink()
    line = refused(run, InputError)
    assert f"`crosstill train {home / 'cache'} --out {run} --resume`" in line


def test_a_cache_that_is_gone(home, tmp_path):
    run = copied(home, tmp_path)
    rewrite(run, cache={"folder": str(tmp_path / "gone"), "digest": "0"})
    line = refused(run, InputError)
    assert str(tmp_path / "gone") in line and "gone; put it back" in line


def test_a_cache_that_is_another(home, tmp_path):
    run = copied(home, tmp_path)
    rewrite(run, cache={"folder": str(home / "cache"), "digest": "0" * 64})
    assert f"{home / 'cache'} is no longer the cache" in refused(run, MismatchError)


def test_a_log_that_is_gone_or_damaged(home, tmp_path):
    run = copied(home, tmp_path)
    log = run / "events.jsonl"
    log.write_text(log.read_text() + '{"kind": "step"')
    assert re.search(r"events\.jsonl, line 23: not a line", refused(run, CorruptError))
    log.unlink()
    assert "events.jsonl: the run's log is gone" in refused(run, InputError)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_photo_that_is_gone_or_changed(home, damage):
    cache = Cache(home / "cache")
    photo = home / "photos" / cache.paths[int(cache.split("val").images[0])]
    whole = photo.read_bytes()
    try:
        if damage == "gone":
            photo.unlink()
            line = refused(home / "run", DataError)
        else:
            photo.write_bytes(whole + b"x")
            line = refused(home / "run", MismatchError)
    finally:
        photo.write_bytes(whole)
    assert photo.name in line and str(home / "cache") in line


@pytest.mark.parametrize("name", report.NEEDS)
def test_a_missing_extra(home, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    line = refused(home / "run", ConfigError)
    assert name in line and "pip install 'crosstill[report]'" in line


def test_the_verb(quiet):
    assert quiet.printed == str(quiet.folder / "report.html")
