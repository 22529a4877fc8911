"""Runs from photos without captions and texts without photos, through the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crosstill import cache, data, students
from crosstill.cache import Cache
from crosstill.data import scenes as scenery
from crosstill.evaluate import CachedSplit
from crosstill.evaluate.agreement import agreement
from crosstill.objectives.base import Objective
from crosstill.train import Run, TrainConfig, distributed
from crosstill.train.batches import Stream
from crosstill.train.task import PairTask, loss_rows
from crosstill.types import Features, Ids, text_key
from report.pages import Page
from support import small_config
from verbs import TOML, crosstill, refusal

COUNT = 96
QUICK = ["epochs=2", "steps_per_epoch=4", "batch_size=16", "lr=1e-3", "log_every=1", "save_every=3"]
UNPAIRED = "losses=contrastive+feature+similarity+hard_negative+kd"
QUEUE = "losses.contrastive.queue_size=24"


def listed(folder: Path, captioned: int) -> Path:
    """Write scenes of which every so-and-so-many-th has captions; 0: none has."""
    listing = scenery.write(folder, COUNT)
    record = json.loads(listing.read_text())
    for number, item in enumerate(record["images"]):
        item["split"] = "val" if number // 3 % 4 == 3 else "train"
        if not captioned or number % captioned:
            item["sentences"] = []
    listing.write_text(json.dumps(record))
    return listing


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Caches of one teacher: "mixed", "unpaired" without any pair, and "photos" alone."""
    home = tmp_path_factory.mktemp("unpaired")
    mixed, bare = listed(home / "mixed-photos", 3), listed(home / "bare-photos", 0)
    captions = sorted({c for e in data.open(mixed).examples for c in e.captions})
    (home / "lines.txt").write_text("\n".join(f"{c} {i}" for i, c in enumerate(3 * captions)))
    students.build(small_config(), dim=16, captions=captions).save(home / "teacher")
    texts = ("--texts", home / "lines.txt")
    crosstill("cache", home / "teacher", mixed, *texts, "--out", home / "mixed")
    crosstill("cache", home / "teacher", bare, *texts, "--out", home / "unpaired")
    crosstill("cache", home / "teacher", bare, "--out", home / "photos")
    for name in ("mixed", "unpaired"):
        (home / f"{name}.toml").write_text(TOML)
    # without texts there is nothing to learn tokens from
    students.load(home / "teacher").text_tower.save_pretrained(home / "text")
    students.load(home / "teacher").tokenizer.save_pretrained(home / "text")
    image = TOML.partition("[text.config]")[0]
    (home / "photos.toml").write_text(f'{image}[text]\nsource = "{home / "text"}"\n')
    return home


def typed(home: Path, name: str, *changes: str) -> list[object]:
    """What is typed after `crosstill train`, but for --out."""
    settings = [word for change in (*QUICK, *changes) for word in ("--set", change)]
    return [home / name, "--student", home / f"{name}.toml", *settings]


def opened(home: Path, name: str) -> Cache:
    found = cache.open(home / name)
    assert isinstance(found, Cache)
    return found


def events(run: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_mixed_run_learns_from_all_and_is_measured_by_its_pairs(home, tmp_path):
    changes = (UNPAIRED, "losses.info_nce={}", QUEUE)
    crosstill("train", *typed(home, "mixed", *changes), "--out", tmp_path / "run")
    run = Run(tmp_path / "run")
    names = {*UNPAIRED.removeprefix("losses=").split("+"), "info_nce"}
    assert all(event["losses"].keys() == names for event in events(run.folder, "step"))
    source = opened(home, "mixed")
    val = source.split("val")
    assert val.pairs and len(val.captioned) < len(val.images)
    best = run.metrics["best"]
    assert best["val"]["images"] == len(val.captioned) and best["val"]["captions"] == val.pairs
    recall = CachedSplit(source, val.paired(), run.best).recall(run.best)
    assert best["rsum"] == pytest.approx(recall.value, abs=1e-6)


def test_rows_of_a_batch_are_pairs_and_then_others(home):
    source, config = opened(home, "mixed"), TrainConfig(batch_size=16)
    student = students.build(small_config(), dim=16, captions=["a red circle"])
    split = source.split("train")
    batch = Stream(source, split, student, config, distributed.alone()).batch(0, 1)
    paired = batch.picked.paired
    assert 0 < paired < 16 and batch.ids.paired == paired
    captions = split.captions[batch.picked.captions]
    images = split.images[batch.picked.images]
    assert (source.owner[captions[:paired]] == images[:paired]).all()
    assert (source.owner[captions[paired:]] == -1).all()
    assert not np.isin(batch.picked.images[paired:], split.captioned).any()
    assert torch.equal(batch.ids.image, source.keys[torch.from_numpy(images)])
    assert torch.equal(batch.ids.text[:paired], batch.ids.image[:paired])
    own = [text_key(source.texts[row]) for row in captions[paired:]]
    assert batch.ids.text[paired:].tolist() == own and max(own) < -1
    torch.testing.assert_close(batch.teacher.text, source.text_features(captions))
    torch.testing.assert_close(
        batch.teacher.image, source.image_features(images, batch.picked.views)
    )
    assert len(batch.image_of) == len(batch.texts.input_ids) == 16


@pytest.mark.parametrize("pairs", [True, False])
def test_losses_with_pairs_get_the_pairs_alone(pairs):
    loss = Objective()
    loss.pairs = pairs
    rows = Features(torch.arange(5.0)[:, None], torch.arange(4.0)[:, None])
    ids = Ids(torch.arange(5), torch.tensor([0, 1, -7, -8]), 2)
    student, teacher, given = loss_rows(loss, rows, rows, ids)
    if pairs:
        assert [len(x) for x in (*student, *teacher)] == 4 * [2] and given.tolist() == [0, 1]
    else:
        assert student is rows and teacher is rows and given is ids
    whole = Ids(ids.image[:4], ids.image[:4], 4)
    assert torch.equal(loss_rows(loss, rows, rows, whole)[2], whole.image)


def test_chunks_give_the_gradient_of_the_batch(home):
    """The mixed batch in chunks of 5 rows, and whole."""
    source, gradients = opened(home, "mixed"), []
    for size in (None, 5):
        config = TrainConfig(batch_size=16, chunk_size=size, losses={"kd": {}, "info_nce": {}})
        task = PairTask(source, config, distributed.alone())
        student = students.build(small_config(), dim=16, captions=source.captions("train"))
        task.fit(student)
        task.start(student.eval())  # no dropout
        _, batch, _ = next(iter(task.batches(0, 0)))
        task.backward(batch)
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("freeze", ["none", "image", "text"])
@pytest.mark.parametrize("name", ["unpaired", "photos"])
def test_a_run_without_pairs_is_measured_by_its_teacher(home, tmp_path, name, freeze):
    losses = UNPAIRED if name == "unpaired" else UNPAIRED.removesuffix("+kd")
    changes = [losses, QUEUE, *([f"freeze={freeze}"] if freeze != "none" else [])]
    found = crosstill("train", *typed(home, name, *changes), "--out", tmp_path / "run")
    run = Run(tmp_path / "run")
    best = run.metrics["best"]
    assert "rsum" not in best and run.metrics["teacher"] is None
    assert f"best val top-10 agreement {best['agreement']:.2f} at epoch" in found.stdout
    assert json.loads((run.folder / "best.json").read_text()) == best
    source = opened(home, name)
    val, student = source.split("val"), run.best
    rows = Features(
        student.embed_images(torch.stack([p for p in photos(source, val, student)])),
        student.embed_texts([source.texts[row] for row in val.captions]),
    )
    sides = source.split_sides(val)
    expected = agreement(rows, Features(*(sides.get(s, torch.empty(0)) for s in rows._fields)))
    assert best["agreement"] == pytest.approx(expected.value, abs=1.5)  # ties of rounding
    ways = {"unpaired": {"text→image", "image→text"}, "photos": {"image→image"}}[name]
    assert best["val"]["overlap"].keys() == ways
    before = run.untrained.state_dict()
    unmoved = {
        key for key, value in student.state_dict().items() if torch.equal(value, before[key])
    }
    still = {
        side for side in ("image", "text") if any(k.startswith(f"{side}_tower") for k in unmoved)
    }
    assert still == ({"text"} if name == "photos" else set()) | ({freeze} - {"none"})


def photos(source: Cache, split, student):
    store = cache.pixels(source, split, student.preprocess)
    return store.take(np.arange(len(split.images)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unpaired", ["losses.info_nce={}"], "has no pairs of photo and caption, which info_nce"),
        ("unpaired", ["paired_share=0.5"], "paired_share = 0.5: split 'train' has no photo with a"),
        ("mixed", ["paired_share=0.0", "losses.crd={}"], "paired_share = 0.0: has no pairs of"),
        ("photos", ["losses.kd={}"], "has no texts, which kd needs; leave it out"),
        ("photos", ["losses.feature.side=text"], "has no texts, which feature needs"),
        ("photos", ["batch_size=999"], "is more than the 72 photos of split 'train'; use --set"),
    ],
)
def test_what_cannot_be_learnt_without_pairs_is_refused_by_name(
    home, tmp_path, name, changes, message
):
    arguments = typed(home, name, QUEUE, *changes)
    assert message in refusal("train", *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_refusal_names_losses_that_work(home, tmp_path):
    error = refusal("train", *typed(home, "photos", "losses=crd"), "--out", tmp_path / "run")
    fitting = error.split("choose among ")[1].split(", ")
    assert {"contrastive", "feature", "hard_negative", "instance", "rkd"} <= {*fitting}
    assert not {"crd", "info_nce", "clip_kd", "kd", "fsp"} & {*fitting}


def test_sentences_alone_are_refused(home, tmp_path):
    (tmp_path / "empty").mkdir()
    lines = ("--texts", home / "lines.txt", "--out", tmp_path / "cache")
    assert "no images in it" in refusal("cache", home / "teacher", tmp_path / "empty", *lines)
    error = refusal("cache", home / "teacher", home / "lines.txt", *lines)
    assert "not a dataset" in error and error.endswith("PHOTOS --texts LINES.txt")
    assert not (tmp_path / "cache").exists()


def test_a_student_without_words_is_told_where_they_come_from(home, tmp_path):
    error = refusal("train", home / "photos", "--student", home / "unpaired.toml",
                    "--out", tmp_path / "run")  # fmt: skip
    assert "captions are needed; make the cache with --texts LINES.txt, or give the tower" in error


@pytest.mark.parametrize(
    ("name", "losses", "remedy"),
    [
        ("unpaired", "feature+similarity", ", add losses.kd=true, or train longer"),
        ("photos", "feature+similarity", "set lr below 1e-09, or train longer"),
    ],
)
def test_the_remedy_for_rows_that_are_alike_needs_no_pairs(
    home, tmp_path, caplog, name, losses, remedy
):
    typed_words = typed(home, name, f"losses={losses}", "lr=1e-9", "init_heads=random")
    crosstill("train", *typed_words, "--out", tmp_path / "run")
    (warning,) = [line for line in caplog.messages if "rows are alike" in line]
    assert warning.endswith(remedy)


@pytest.fixture(scope="module")
def followed(home, tmp_path_factory) -> Path:
    """A run without any pair."""
    out = tmp_path_factory.mktemp("followed") / "run"
    crosstill("train", *typed(home, "unpaired", UNPAIRED, QUEUE), "--out", out)
    return out


def test_the_report_names_the_agreement(followed, tmp_path):
    crosstill("report", followed, "--out", tmp_path / "report")
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    best = Run(followed).metrics["best"]
    assert figures["student"]["agreement"] == pytest.approx(best["agreement"], abs=1e-6)
    assert "teacher" not in figures and "agreement" in figures["untrained"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Agreement with the teacher" in page and "top-10 agreement on val" in page
    assert "RSUM" not in page and "Recall in percent" not in page
    assert f"{best['agreement']:.2f}" in (tmp_path / "report" / "table.md").read_text()


def test_the_report_shows_what_texts_find_and_calls_no_photo_right(home, followed, tmp_path):
    crosstill("report", followed, "--out", tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "No text belongs to a photo" in page.text
    assert len(page.all("article")) == 10 and len(page.all("li")) == 10 * 2 * 5
    assert not any(item.get("class") == "right" for item in page.all("li"))
    source = opened(home, "unpaired")
    shown = [picture["alt"] for picture in page.all("img") if picture["alt"].endswith(".png")]
    row_of = {Path(path).name: row for row, path in enumerate(source.paths)}
    # independently: the first photos by the rows of the cache, and by the student's own
    words = re.findall("“(.*?)”", page.text)
    models = {"teacher": source.image_features(source.split("val").images)}
    student = Run(followed).best
    held_out = CachedSplit(source, source.split("val"), student)
    models["student"] = held_out.features(student).image
    wanted, common = [], []
    for text in words:
        row = source.texts.index(text)
        asked = source.text_features(np.array([row])), student.embed_texts([text])
        both = zip(models.values(), asked, strict=True)
        first = [(rows @ query[0]).topk(5).indices.tolist() for rows, query in both]
        wanted += [int(source.split("val").images[place]) for some in first for place in some]
        common.append(len({*first[0]} & {*first[1]}))
    assert [row_of[name] for name in shown] == wanted
    told = re.findall(r"student: (\d) of the teacher's 5", page.text)
    assert [int(number) for number in told] == common


def test_the_export_is_gated_by_the_agreement(followed, tmp_path):
    found = crosstill("export", followed, "--to", "onnx", "--int8", "--max-loss", "1", "--out",
                      tmp_path / "bundle")  # fmt: skip
    assert "top-10 agreement" in found.stderr + found.stdout and "RSUM" not in found.stdout
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "## Agreement with the teacher" in card and "text→image overlap" in card
    assert "Its top-10 agreement on val is" in card and "RSUM" not in card


def test_tables_of_recall_refuse_a_cache_without_pairs(home, tmp_path):
    error = refusal("ablate", "table5", home / "unpaired", "--student", home / "unpaired.toml",
                    "--out", tmp_path / "grid")  # fmt: skip
    assert "no photo with captions" in error
