import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import CAPTIONS, CARD, alone, said_by, small, write

from crosstill import images, students, teachers
from crosstill.errors import ConfigError, ExportError
from crosstill.export.card import Facts, Origin, card
from crosstill.export.library_folders import TransformersFolder
from crosstill.pixels import Preprocess
from crosstill.students.student import Student
from crosstill.students.student_config import PRESETS

TRANSFORMERS = TransformersFolder()
ALONE = """
from transformers import AutoModel, AutoProcessor, VisionTextDualEncoderModel
from transformers import VisionTextDualEncoderProcessor
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
assert type(model) is VisionTextDualEncoderModel, type(model)
assert type(processor) is VisionTextDualEncoderProcessor, type(processor)
assert processor.tokenizer.model_max_length == 12
texts = ["a red cube", "", "Ünïcode 🎈", "a blue ball left of a red cube " * 9]
tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
assert tokens["input_ids"].shape == (4, 12)
photo = processor(images=Image.open(sys.argv[2]), return_tensors="pt")
with torch.inference_mode():
    both = model(**tokens, **photo)
torch.save({"text": both.text_embeds, "image": both.image_embeds}, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("image", "text"),
    [
        pytest.param("vit", "bert", marks=pytest.mark.slow),
        ("mobilenet_v2", "roberta"),
        pytest.param("clip_vision_model", "albert", marks=pytest.mark.slow),
    ],
)
def test_towers_that_fit(image: str, text: str, tmp_path: Path) -> None:
    student = small(image, text)
    assert TRANSFORMERS.fits(student) == []
    parity = write(TRANSFORMERS, student, tmp_path / "out", CARD)
    assert parity.holds and max(parity.images, parity.texts) < 1e-5 and parity.cosine > 0.999
    assert parity == TRANSFORMERS.check(student, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == CARD


def test_the_presets_for_this_form() -> None:
    mobile, fitting = PRESETS["mobile"].model_dump(), PRESETS["mobile-hf"].model_dump()
    changed = {"name": "mobile-hf", "text": {**mobile["text"], "pooling": "pooler"}}
    assert fitting == {**mobile, **changed}
    assert TRANSFORMERS.fits(students.build("tiny-hf", 24, CAPTIONS)) == []
    assert TRANSFORMERS.fits(students.build("tiny", 24, CAPTIONS)) != []


@alone
def test_plain_transformers_loads_it_where_crosstill_is_absent(
    alone: Callable[..., None], tmp_path: Path
) -> None:
    student = small("mobilenet_v2", max_length=12)
    write(TRANSFORMERS, student, tmp_path / "out", CARD)
    noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)  # of the size that it takes
    Image.fromarray(noise.numpy()).save(tmp_path / "photo.png")
    alone(ALONE, tmp_path / "out", tmp_path / "photo.png", tmp_path / "rows.pt")
    found = torch.load(tmp_path / "rows.pt", weights_only=True)
    texts = ["a red cube", "", "Ünïcode 🎈", "a blue ball left of a red cube " * 9]
    torch.testing.assert_close(found["text"], student.embed_texts(texts), atol=1e-5, rtol=0)
    rows = student.embed_images(noise.permute(2, 0, 1)[None])
    torch.testing.assert_close(found["image"], rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"poolings": "pooler mean"}, 'text tower is pooled by "mean"'),
        ({"poolings": "cls pooler"}, 'image tower is pooled by "cls"'),
        ({"bias": True}, "its heads have a bias"),
        ({"image": "resnet"}, "the pooler of a resnet gives maps"),
        ({"text": "distilbert", "poolings": "pooler cls"}, "its text tower"),
    ],
)
def test_students_that_do_not_fit(made: dict, reason: str, tmp_path: Path) -> None:
    student = small(**made)
    with pytest.raises(ConfigError) as caught:
        write(TRANSFORMERS, student, tmp_path / "out", CARD)
    line = str(caught.value)
    assert reason in line and "sentence-transformers" in line and "onnx" in line
    assert "\n" not in line
    assert list(tmp_path.iterdir()) == []


def test_all_reasons_are_named_at_once() -> None:
    assert len(TRANSFORMERS.fits(small("resnet", poolings="pooler mean", bias=True))) == 3


@pytest.mark.parametrize(
    ("preprocess", "word"),
    [
        (Preprocess(size=(32, 32), resize="fit", shorter=32), "fit"),
        (Preprocess(size=(32, 32), resize="crop", shorter=40, longer=60), "longer"),
        (Preprocess(size=(32, 32), resize="crop", shorter=48, multiple=16), "multiple"),
    ],
)
def test_a_preprocess_that_no_processor_does(preprocess: Preprocess, word: str) -> None:
    student = small()
    student.preprocess = preprocess
    (reason,) = TRANSFORMERS.fits(student)
    assert word in reason


@pytest.mark.parametrize(
    ("resize", "shorter", "kind", "interpolation"),
    [
        ("squash", None, "ViTImageProcessor", "bicubic"),
        ("crop", None, "CLIPImageProcessor", "bilinear"),
        ("crop", 41, "CLIPImageProcessor", "bicubic"),
        pytest.param("squash", None, "ViTImageProcessor", "bilinear", marks=pytest.mark.slow),
        pytest.param("crop", None, "CLIPImageProcessor", "bicubic", marks=pytest.mark.slow),
        pytest.param("crop", 41, "CLIPImageProcessor", "bilinear", marks=pytest.mark.slow),
    ],
)
def test_the_preprocess_goes_along(
    resize: str, shorter: int | None, kind: str, interpolation: str, tmp_path: Path
) -> None:
    student = small()
    student.preprocess = Preprocess(
        size=(32, 32),
        resize=resize,
        shorter=shorter,
        interpolation=interpolation,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )
    parity = write(TRANSFORMERS, student, tmp_path / "out", CARD)
    assert parity.levels <= 2
    record = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert record["image_processor"]["image_processor_type"] == kind


def test_it_comes_back_as_a_teacher_with_the_same_rows(tmp_path: Path) -> None:
    student = small(poolings="pooler pooler")
    write(TRANSFORMERS, student, tmp_path / "out", CARD)
    again = teachers.load(tmp_path / "out")
    assert again.preprocess == student.preprocess and again.licence == "mit"
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(
        again.embed_images(pixels), student.embed_images(pixels), atol=1e-5, rtol=0
    )
    texts = ["a red cube", "a blue ball left of a red cube " * 9]
    torch.testing.assert_close(
        again.embed_texts(texts), student.embed_texts(texts), atol=1e-5, rtol=0
    )


def test_the_student_stays_as_it_is(tmp_path: Path) -> None:
    student = small("mobilenet_v2").train()
    student.save(tmp_path / "before")
    draws = torch.random.get_rng_state()
    write(TRANSFORMERS, student, tmp_path / "out", CARD)
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert student.training
    student.save(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()


def _wrong_row(student: Student, folder: Path) -> None:
    with torch.no_grad():
        student.text_head.weight[0] += 1e-3
        _save(student, folder)
        student.text_head.weight[0] -= 1e-3


def _wrong_pixels(student: Student, folder: Path) -> None:
    right = student.preprocess
    student.preprocess = replace(right, mean=(0.5, 0.5, 0.4))
    _save(student, folder)
    student.preprocess = right


_save = TRANSFORMERS.save


@pytest.mark.parametrize("wrong", [_wrong_row, pytest.param(_wrong_pixels, marks=pytest.mark.slow)])
def test_a_failed_gate_keeps_what_was_there(
    wrong: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = small(), tmp_path / "out"
    write(TRANSFORMERS, student, out, CARD)
    monkeypatch.setattr(TRANSFORMERS, "save", wrong)
    with pytest.raises(ExportError, match=r"texts.*bound.*pixels.*of 255") as caught:
        write(TRANSFORMERS, student, out, "another card")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == CARD
    assert TRANSFORMERS.check(student, out).holds


def test_the_gates_photos_decode_as_in_training() -> None:
    from crosstill.export.gates import _SIZES, _png

    data = [_png(number, size) for number, size in enumerate(_SIZES)]
    assert [tuple(images.decode(d, "photo").shape) for d in data] == [(*s, 3) for s in _SIZES]


def test_the_lines_of_the_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = small()
    facts = Facts("small", {}, 24, 30, student.preprocess, Origin("scenes", "mit"))
    write(TRANSFORMERS, student, tmp_path / "out", card(facts, TRANSFORMERS))
    monkeypatch.chdir(tmp_path)
    found = said_by((tmp_path / "out" / "README.md").read_text(), tmp_path / "out")
    data = (tmp_path / "photo.jpg").read_bytes()
    pixels = images.load(data, "photo", student.preprocess)
    texts = student.embed_texts(["two dogs on snow", "a red car"])
    expected = (student.embed_images(pixels[None]) @ texts.T).flatten().tolist()
    assert [float(n) for n in re.findall(r"-?\d\.\d+", found)] == pytest.approx(expected, abs=2e-3)
