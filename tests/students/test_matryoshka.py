from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import data, evaluate, export, files, students
from crosstill.bundle import Bundle
from crosstill.cache import Cache, build
from crosstill.cache.centring import centred
from crosstill.errors import ConfigError
from crosstill.objectives.wrappers import cut, principal_axes
from crosstill.recipes import distill
from crosstill.students.student import Student
from crosstill.students.student_config import StudentConfig, parse
from crosstill.types import Features
from support import FAST, SETTINGS, SmallTeacher, same, small_config

WIDTHS = (4, 8)


def nested(cached: Cache, widths: tuple[int, ...] = WIDTHS, **changes: object) -> Student:
    config = small_config().model_copy(update={"widths": widths, **changes})
    return students.build(config, cached.dim, cached.captions("train"))


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2, 0.1, width)[torch.randperm(width, generator=draw)]
    return normalize(torch.randn(count, width, generator=draw) * scale, dim=1)


def test_axes_turn_and_keep_cosines() -> None:
    found = principal_axes([rows(90, 12), rows(50, 12, 1)])
    torch.testing.assert_close(found.T @ found, torch.eye(12), rtol=0, atol=1e-5)
    mine = rows(20, 12)
    turned = mine @ found
    torch.testing.assert_close(turned @ turned.T, mine @ mine.T, rtol=0, atol=1e-5)


def test_the_first_axes_hold_the_most() -> None:
    """Closed form: of one set of rows, what w axes leave out are the smallest singular values."""
    mine = rows(90, 12)
    found, values = principal_axes([mine]), torch.linalg.svdvals(mine)
    for width in (1, 5, 11):
        axes = found[:, :width]
        left = (mine - mine @ axes @ axes.T).norm()
        torch.testing.assert_close(left, values[width:].norm(), rtol=1e-4, atol=1e-5)


def test_sides_count_alike_however_many_rows_they_have() -> None:
    image, text = rows(30, 6), rows(40, 6, 1)
    once = principal_axes([image, text])
    thrice = principal_axes([image, text.repeat(3, 1)])
    torch.testing.assert_close(once, thrice, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_cut_student_says_the_first_numbers(cached: Cache, bias: bool) -> None:
    student = nested(cached, bias=bias).eval()
    student.axes.copy_(principal_axes([rows(50, 16)]))
    with torch.no_grad():
        for head in (student.image_head, student.text_head):
            head.bias is None or head.bias.normal_()
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    texts = cached.texts[:4]
    whole = Features(student.embed_images(pixels), student.embed_texts(texts))
    full = students.shorten(student, 16)
    for width in (4, 16):
        small = students.shorten(student, width)
        assert (small.dim, small.config.widths) == (width, ())
        shorter = cut(whole, student.axes[:, :width])
        torch.testing.assert_close(small.embed_images(pixels), shorter.image, rtol=0, atol=1e-5)
        torch.testing.assert_close(small.embed_texts(texts), shorter.text, rtol=0, atol=1e-5)
        first = normalize(full.embed_images(pixels)[:, :width], dim=1)
        torch.testing.assert_close(first, shorter.image, rtol=0, atol=1e-5)
    assert students.shorten(student, 4).name == "small@4" and full.name == "small"
    assert (
        not students.shorten(student, 4).training and students.shorten(student.train(), 4).training
    )
    with pytest.raises(ConfigError, match="has embeddings of 16, not of 17"):
        students.shorten(student, 17)


@pytest.fixture(scope="module")
def run(cached: Cache, tmp_path_factory: pytest.TempPathFactory):
    """A short run at widths 4, 8 and 16."""
    place = tmp_path_factory.mktemp("nested")
    return distill(nested(cached), cached, "dsmd", out=place / "run", changes=FAST)


def test_a_run_finds_the_axes_and_keeps_them(run, cached: Cache) -> None:
    split, rows = cached.split("train"), centred(cached, "train", "auto")
    images, texts = rows.image_features(split.images), rows.text_features(split.captions)
    assert torch.equal(run.best.axes, principal_axes([images, texts]))
    assert torch.equal(run.untrained.axes, run.best.axes)
    assert run.best.widths == (4, 8, 16)


def test_the_losses_are_as_many_as_without(run) -> None:
    line = (run.folder / "events.jsonl").read_text().splitlines()[0]
    assert all(f'"{name}": ' in line for name in SETTINGS["losses"])
    assert "@" not in line


def test_a_run_may_be_cut_short_and_resumed(run, cached: Cache, tmp_path: Path, monkeypatch):
    from crosstill.train.task import PairTask

    whole = PairTask.backward
    taken: list[int] = []

    def dies(self: PairTask, batch: object):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return whole(self, batch)

    changes = (*FAST, "save_every=1")
    calm = distill(nested(cached), cached, "dsmd", out=tmp_path / "calm", changes=changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PairTask, "backward", dies)
        distill(nested(cached), cached, "dsmd", out=tmp_path / "cut", changes=changes)
    again = distill(None, cached, "dsmd", out=tmp_path / "cut", changes=changes, resume=True)
    assert same(calm.best.state_dict(), again.best.state_dict())


def test_evaluate_shows_a_row_a_width(run) -> None:
    from crosstill.evaluate import compare

    pairs = data.open("scenes:60").split("val")
    found = compare.run(str(run.folder), pairs).table()
    assert all(f"run@{width} " in found for width in WIDTHS) and "@16" not in found
    small = evaluate.open_model(f"{run.folder}@8")
    assert isinstance(small, Student) and small.dim == 8
    assert f"| {evaluate.retrieval(small, pairs).recall.rsum:.2f} |" in found
    with pytest.raises(ConfigError, match="has embeddings of 16, not of 99"):
        evaluate.open_model(f"{run.folder}@99")


@pytest.mark.slow
def test_the_first_numbers_of_an_export_are_an_embedding(run, tmp_path: Path) -> None:
    export.onnx(run, tmp_path / "whole")
    lines = export.onnx(f"{run.folder}@4", tmp_path / "small").lines
    assert lines[-1].startswith("RSUM ")  # of the run's own photos
    whole, small = (evaluate.open_model(tmp_path / name) for name in ("whole", "small"))
    assert Bundle.open(tmp_path / "small").dim == small.dim == 4
    texts = data.open("scenes:60").examples[0].captions
    first = normalize(whole.embed_texts(texts)[:, :4], dim=1)
    torch.testing.assert_close(first, small.embed_texts(texts), rtol=0, atol=1e-5)


def test_other_rows_than_a_teachers(cached: Cache, scenes, tmp_path: Path) -> None:
    """Without a teacher the axes are those of the student; without its texts, of its photos."""
    mute = build(None, scenes, tmp_path / "mute")
    config = small_config().model_copy(update={"widths": WIDTHS, "dim": 16})
    student = students.build(config, None, mute.captions("train"))
    run = distill(student, mute, "info_nce", out=tmp_path / "run", changes=FAST[:-1])
    assert torch.equal(run.best.axes, torch.eye(16))

    class Blind(SmallTeacher):
        modalities = frozenset({"image"})

    images = build(Blind(), scenes, tmp_path / "images")
    changes = (*FAST[:-1], "losses={feature={side='image'}, info_nce={}}")
    run = distill(nested(images), images, "info_nce", out=tmp_path / "half", changes=changes)
    assert run.best.widths == (4, 8, 16)
    assert not torch.equal(run.best.axes, torch.eye(16))


def test_rows_before_their_normalisation(cached: Cache, tmp_path: Path) -> None:
    changes = (*FAST, "normalise=false")
    run = distill(nested(cached), cached, "dsmd", out=tmp_path / "run", changes=changes)
    assert files.read_json(run.folder / "metrics.json")["steps"] == 4


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([8, 4], "widths ascend"),
        ([4, 4], "widths ascend"),
        ([0, 4], "widths ascend"),
        ([4, 99], "widths: 99 is more than dim = 16"),
    ],
)
def test_widths_that_cannot_be(widths: list[int], message: str) -> None:
    told = small_config().model_dump() | {"dim": 16, "widths": widths}
    with pytest.raises(ConfigError, match=message):
        parse(told, "student.toml")


def test_widths_wider_than_the_teacher(cached: Cache) -> None:
    with pytest.raises(ConfigError, match="widths up to 32 do not fit embeddings of 16"):
        nested(cached, (4, 32))


def test_a_width_that_is_the_dim_changes_nothing(cached: Cache) -> None:
    config = StudentConfig.model_validate(small_config().model_dump() | {"widths": [4, 16]})
    assert students.build(config, 16, cached.texts).widths == (4, 16)
