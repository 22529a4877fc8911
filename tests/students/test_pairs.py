"""Every tower that docs/students.md names, from a pretrained-like folder to an export.

Each image tower meets one text tower and each text tower one image tower, with each of its
poolings: towers know nothing of each other, so their whole product would test the same again.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import families
import pytest
import torch
from families import IMAGE, TEXT, Family
from transformers import AutoModel, AutoTokenizer

from crosstill import export, files, students
from crosstill.cache import Cache
from crosstill.errors import ConfigError, ModelError
from crosstill.export.library_folders import SentenceTransformersFolder, TransformersFolder
from crosstill.recipes import distill
from crosstill.students.student import Student
from crosstill.students.student_config import StudentConfig
from crosstill.towers.tower_parts import pool
from support import matrix

DOCS = Path(__file__).parent.parent.parent / "docs" / "students.md"
ONE_STEP = (
    "epochs=1",
    "steps_per_epoch=1",
    "batch_size=8",
    "lr=1e-3",
    "weight_decay=0",
    "losses.contrastive.queue_size=16",
    "log_every=1",
)
CASES = [(family, pooling) for family in IMAGE + TEXT for pooling in family.poolings]
# one of each mechanism of ours: a token, a token for masks, maps with batch norms, stages, a norm
# of the pooler's alone; a learnt pooler, layers that share weights, layers of two types
CHIEF = {
    ("vit", "cls"),
    ("dinov2", "cls"),
    ("convnext", "mean"),
    ("resnet", "mean"),
    ("swin", "pooler"),
    ("bert", "pooler"),
    ("albert", "cls"),
    ("modernbert", "mean"),
}
CHIEF_TYPES = {kind for kind, _ in CHIEF}
PARTS = {"image_tower", "text_tower", "image_head", "text_head"}
Build = Callable[[Family, str], Student]


def each(
    cases: list[tuple[Family, str]], chosen: Collection[tuple[str, str]] = CHIEF
) -> pytest.MarkDecorator:
    """All these cases, of which those that are not chosen are slow."""
    names = [f"{family.type}-{pooling}" for family, pooling in cases]
    chief = [case for case in cases if (case[0].type, case[1]) in chosen]
    return pytest.mark.parametrize(("family", "pooling"), matrix(cases, chief), ids=names)


def each_family(families: tuple[Family, ...]) -> pytest.MarkDecorator:
    chief = [family for family in families if family.type in CHIEF_TYPES]
    return pytest.mark.parametrize(
        "family", matrix(families, chief), ids=[family.type for family in families]
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's folder: of a classifier or a language model, or of the tower alone."""
    place = tmp_path_factory.mktemp("towers")

    def find(family: Family, bare: bool = False) -> Path:
        folder = place / f"{family.type}{'-bare' * bare}"
        if not folder.is_dir():
            save = families.save_image if family in IMAGE else families.save_text
            save(family, folder, **({"kind": AutoModel} if bare else {}))
        return folder

    return find


@pytest.fixture(scope="module")
def build(saved: Callable[..., Path], cached: Cache) -> Build:
    """A student with a family's tower beside a ViT or a BERT."""

    def make(family: Family, pooling: str, **changes: object) -> Student:
        image = {"source": str(saved(IMAGE[0])), "pooling": "cls"}
        text = {"source": str(saved(TEXT[0])), "pooling": "mean", "vocabulary": "trim"}
        # a task model comes without a pooler that learns
        own = {"source": str(saved(family, pooling == "pooler")), "pooling": pooling, **changes}
        (image if family in IMAGE else text).update(own)
        told = {"name": family.type, "image": image, "text": text}
        config = StudentConfig.model_validate(told)
        return students.build(config, cached.dim, cached.captions("train") + families.CAPTIONS)

    return make


def seen(student: Student) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (3, 3, *student.preprocess.size), dtype=torch.uint8, generator=draw
    )
    texts = ["a red cube", "", "an elephant 🎈 left of a ball " * 9]
    return [student.embed_images(pixels), student.embed_texts(texts)]


@each(CASES)
def test_it_learns_and_is_kept(
    build: Build, cached: Cache, family: Family, pooling: str, tmp_path: Path
) -> None:
    student = build(family, pooling)
    run = distill(student, cached, "dsmd", out=tmp_path / "run", changes=ONE_STEP)
    line = (run.folder / "events.jsonl").read_text().splitlines()[0]
    assert '"kind": "step"' in line and "NaN" not in line and "Infinity" not in line
    before, after = run.untrained.state_dict(), run.best.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == PARTS
    assert not any("running_" in name for name in moved)
    assert not _idle(student.train(), cached)
    assert all(map(torch.equal, seen(student.eval()), seen(run.best)))
    reasons = "; ".join(TransformersFolder().fits(run.best))
    word = family.plain(pooling)
    assert word in reasons if word else f"its {_side(family)} tower" not in reasons
    assert not SentenceTransformersFolder().fits(run.best)


def _idle(student: Student, cached: Cache) -> list[str]:
    """The parameters that are meant to learn and that no gradient reaches."""
    draw = torch.Generator().manual_seed(0)
    size = (8, 3, *student.preprocess.size)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
    rows = student(pixels, student.pad(student.tokenize(cached.texts[:8])))
    (rows.image - rows.text.roll(1, 0)).square().sum().backward()
    learning = {n: p for n, p in student.named_parameters() if p.requires_grad}
    return [n for n, p in learning.items() if p.grad is None or not p.grad.any()]


def _side(family: Family) -> str:
    return "image" if family in IMAGE else "text"


@each([(family, "mean") for family in IMAGE + TEXT], [(kind, "mean") for kind in CHIEF_TYPES])
def test_a_task_model_gives_the_tower_that_it_holds(
    build: Build, saved: Callable[..., Path], family: Family, pooling: str
) -> None:
    student = build(family, pooling).eval()
    plain = AutoModel.from_pretrained(saved(family)).eval()
    with torch.inference_mode():
        if family in IMAGE:
            values = torch.randn(2, 3, *student.preprocess.size)
            found, expected = student.pool_image(values), pool(plain(pixel_values=values), pooling)
        else:
            # a trimmed vocabulary has other ids for the same tokens
            texts = families.CAPTIONS[:1]
            tokens = AutoTokenizer.from_pretrained(saved(family))(texts)["input_ids"]
            found = student.pool_text(*student.pad(student.tokenize(texts)))
            expected = pool(plain(input_ids=torch.tensor(tokens)), pooling)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# tests/export has others by default
@each(CASES, [])
def test_it_is_exported(build: Build, family: Family, pooling: str, tmp_path: Path) -> None:
    export.onnx(build(family, pooling).eval(), tmp_path / "bundle")


@pytest.mark.slow
@each(CASES)
def test_each_is_a_sentence_transformer(
    build: Build, family: Family, pooling: str, tmp_path: Path
) -> None:
    export.sentence_transformers(build(family, pooling).eval(), tmp_path / "folder")


@each(
    [(family, "pooler") for family in IMAGE + TEXT if "pooler" in family.poolings],
    [("vit", "pooler"), ("resnet", "pooler")],
)
def test_a_pooler_makes_it_plain_transformers(
    saved: Callable[..., Path], cached: Cache, family: Family, pooling: str, tmp_path: Path
) -> None:
    sources = [str(saved(tower, True)) for tower in (IMAGE[0], TEXT[0])]
    sources[family in TEXT] = str(saved(family, True))
    towers = [{"source": source, "pooling": "pooler"} for source in sources]
    config = StudentConfig.model_validate({"image": towers[0], "text": towers[1]})
    student = students.build(config, 16, cached.captions("train")).eval()
    if family.plain(pooling):
        with pytest.raises(ConfigError, match=family.plain(pooling)):
            export.transformers(student, tmp_path / "folder")
    else:
        export.transformers(student, tmp_path / "folder")


@each_family(IMAGE)
def test_a_pooling_that_makes_no_sense_is_refused(
    saved: Callable[..., Path], family: Family
) -> None:
    for pooling in {"cls", "mean", "pooler"} - set(family.poolings):
        told = {"image": {"source": str(saved(family)), "pooling": pooling}}
        told["text"] = {"config": TEXT[0].config}
        with pytest.raises(ConfigError, match=f"a {family.type} has no class token"):
            students.build(StudentConfig.model_validate(told), 16, families.CAPTIONS)


@each_family(TEXT)
def test_a_pooler_that_is_not_there_is_named(build: Build, saved, family: Family) -> None:
    if "pooler" not in family.poolings:
        with pytest.raises(ConfigError, match='no pooler; set its pooling to "mean" or "cls"'):
            build(family, "pooler")
        return
    told = {"text": {"source": str(saved(family)), "pooling": "pooler"}}
    told["image"] = {"config": IMAGE[0].config, "pooling": "cls"}
    with pytest.raises(ModelError, match='pooler.*; set the pooling to "mean" or "cls"'):
        students.build(StudentConfig.model_validate(told), 16, families.CAPTIONS)


@each_family(IMAGE + TEXT)
def test_layers_are_cut_or_refused(build: Build, family: Family) -> None:
    if not family.layers:
        with pytest.raises(ConfigError, match=f"a {family.type} has (stages, and )?no layers"):
            build(family, "mean", layers=1)
        return
    whole, cut = (build(family, "mean", layers=layers) for layers in (2, 1))
    assert len(seen(cut)[0]) == 3
    shares = family.type == "albert"
    assert shares == (whole.parameter_count() == cut.parameter_count())
    side = _side(family)
    assert getattr(cut, f"{side}_tower").config.num_hidden_layers == 1
    rows = zip(seen(whole), seen(cut), strict=True)
    same = [torch.allclose(a, b, atol=1e-3) for a, b in rows]
    assert not same[side == "text"]


def test_the_docs_say_the_same() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for side, group in (("image", IMAGE), ("text", TEXT)):
        table = "\n".join(families.table(group, side))
        assert table in text, f"put this into {DOCS.name}:\n{table}"


def test_a_cached_teacher_is_all_it_takes(build: Build, tmp_path: Path) -> None:
    """A loaded student needs none of the folders that it came from."""
    student = build(IMAGE[1], "mean")
    student.save(tmp_path / "student")
    record = files.read_json(tmp_path / "student" / "student.json")["config"]
    assert record["image"]["source"] is None and record["text"]["source"] is None
