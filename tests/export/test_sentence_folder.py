import json
import re
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import CARD, alone, said_by, small, write

from crosstill import export, images
from crosstill.errors import ConfigError, ExportError
from crosstill.export.card import Facts, Origin, card
from crosstill.export.library_folders import SentenceTransformersFolder, TransformersFolder
from crosstill.pixels import Preprocess

TRANSFORMERS = TransformersFolder()
SENTENCES = SentenceTransformersFolder()
ALONE = """
from sentence_transformers import SentenceTransformer
warnings.simplefilter("error")
model = SentenceTransformer(folder, device="cpu")
assert set(model.modalities) == {"text", "image"}
assert model.max_seq_length == 12, model.max_seq_length
assert model.similarity_fn_name == "cosine"
assert set(model.prompts.values()) <= {""} and model.default_prompt_name is None
assert model.get_embedding_dimension() == 24
texts = ["a red cube", "", "Ünïcode 🎈", "a blue ball left of a red cube " * 9]
path = sys.argv[2]
photo = Image.open(path)
photo.load()
rows = {
    "text": model.encode(texts, convert_to_tensor=True),
    "query": model.encode_query(texts, convert_to_tensor=True),
    "one": model.encode(texts[3], convert_to_tensor=True)[None],
    "image": model.encode([photo], convert_to_tensor=True),
    "path": model.encode([path], convert_to_tensor=True),
    "document": model.encode_document([photo], convert_to_tensor=True),
}
assert model.similarity(rows["text"], rows["image"]).shape == (4, 1)
try:
    model.encode([texts[0], photo])
except ValueError as error:
    assert "separately" in str(error), error
else:
    raise AssertionError("a mixed list was encoded: say so in the card")
torch.save({name: value.clone() for name, value in rows.items()}, sys.argv[3])
"""
TEXTS = ["a red cube", "", "Ünïcode 🎈", "a blue ball left of a red cube " * 9]


def _photo(path: Path) -> torch.Tensor:
    noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)  # of the size that it takes
    Image.fromarray(noise.numpy()).save(path)
    return noise.permute(2, 0, 1)[None]


@alone
def test_it_loads_where_crosstill_is_absent_and_without_trust(
    alone: Callable[..., None], tmp_path: Path
) -> None:
    student = small("resnet", poolings="pooler mean", max_length=12, bias=True)
    write(SENTENCES, student, tmp_path / "out", CARD)
    pixels = _photo(tmp_path / "photo.png")
    alone(ALONE, tmp_path / "out", tmp_path / "photo.png", tmp_path / "rows.pt")
    found = torch.load(tmp_path / "rows.pt", weights_only=True)
    texts, image = student.embed_texts(TEXTS), student.embed_images(pixels)
    expected = {"text": texts, "query": texts, "one": texts[3:], "image": image}
    for name, rows in {**expected, "path": image, "document": image}.items():
        torch.testing.assert_close(found[name], rows, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[name].norm(dim=1), torch.ones(len(rows)))


# each pooling once of each tower; all pairs of them are slow
POOLINGS = {("mean", "cls"), ("cls", "pooler"), ("pooler", "mean")}


@pytest.mark.parametrize(
    ("image", "text"),
    [
        pytest.param(*pair, marks=[] if pair in POOLINGS else pytest.mark.slow)
        for pair in product(["mean", "cls", "pooler"], repeat=2)
    ],
)
def test_every_pooling(image: str, text: str, tmp_path: Path) -> None:
    student = small(poolings=f"{image} {text}", bias=image == "cls")
    parity = write(SENTENCES, student, tmp_path / "out", CARD)
    assert parity.holds and parity.cosine > 0.999
    assert (tmp_path / "out" / "README.md").read_text() == CARD


@pytest.mark.parametrize(
    ("image", "text", "poolings"),
    [
        pytest.param("resnet", "albert", "mean mean", marks=pytest.mark.slow),
        ("mobilenet_v2", "roberta", "pooler mean"),
        pytest.param("clip_vision_model", "distilbert", "mean cls", marks=pytest.mark.slow),
    ],
)
def test_other_towers(image: str, text: str, poolings: str, tmp_path: Path) -> None:
    assert write(SENTENCES, small(image, text, poolings), tmp_path / "out", CARD).holds


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_the_preprocess_goes_along(resize: str, tmp_path: Path) -> None:
    student = small("resnet", poolings="pooler mean")
    student.preprocess = Preprocess(
        size=(32, 32), resize=resize, interpolation="bilinear", std=(0.2, 0.3, 0.4)
    )
    assert write(SENTENCES, student, tmp_path / "out", CARD).levels <= 2


def test_a_preprocess_that_no_processor_does_is_refused(tmp_path: Path) -> None:
    student = small()
    student.preprocess = Preprocess(size=(32, 32), resize="fit", shorter=32)
    with pytest.raises(ConfigError, match=r"fit.*Export it as onnx"):
        write(SENTENCES, student, tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_dual_encoder_form_loads_there_too(tmp_path: Path) -> None:
    student = small("mobilenet_v2")
    write(TRANSFORMERS, student, tmp_path / "out", CARD)
    assert (
        SENTENCES.check(student, tmp_path / "out").texts > 1e-5
    )  # its rows are not of unit length
    model = SENTENCES.load(tmp_path / "out").model
    rows = model.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(rows.clone(), student.embed_texts(TEXTS), atol=1e-5, rtol=0)


def test_towers_without_a_pooler_load_without_a_made_up_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = small(poolings="cls mean")
    write(SENTENCES, student, tmp_path / "out", CARD)
    for side in ("image", "text"):
        path = tmp_path / "out" / f"{side}_0_Transformer" / "sentence_bert_config.json"
        assert json.loads(path.read_text())["model_kwargs"] == {"add_pooling_layer": False}
    model = SENTENCES.load(tmp_path / "out").model
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    told = capsys.readouterr()
    assert told.out == "" and "MISSING" not in told.err


def test_nothing_is_said_and_nothing_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student = small("mobilenet_v2", poolings="pooler mean").train()
    student.save(tmp_path / "before")
    draws = torch.random.get_rng_state()
    capfd.readouterr()
    write(SENTENCES, student, tmp_path / "out", CARD)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert student.training
    student.save(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()


@pytest.mark.slow
def test_equal_students_give_equal_folders(tmp_path: Path) -> None:
    student = small()
    for name in ("one", "two"):
        write(SENTENCES, student, tmp_path / name, CARD)
    one, two = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two


def test_a_failed_gate_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, save = small(), SENTENCES.save

    def wrong(student: object, folder: Path) -> None:
        save(small(poolings="mean pooler"), folder)

    monkeypatch.setattr(SENTENCES, "save", wrong)
    with pytest.raises(ExportError, match=r"sentence-transformers: rows differ.*bound 1e-05"):
        write(SENTENCES, student, tmp_path / "out", CARD)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_is_no_number_never_holds(tmp_path: Path) -> None:
    student = small()
    write(SENTENCES, student, tmp_path / "out", CARD)
    path = tmp_path / "out" / "text_1_Dense" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    assert not SENTENCES.check(student, tmp_path / "out").holds


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"crosstill\[export\]"):
        export.sentence_transformers(small(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_lines_of_the_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = small()
    facts = Facts("small", {}, 24, 30, student.preprocess, Origin("scenes", "mit"))
    write(SENTENCES, student, tmp_path / "out", card(facts, SENTENCES))
    monkeypatch.chdir(tmp_path)
    found = said_by((tmp_path / "out" / "README.md").read_text(), tmp_path / "out")
    data = (tmp_path / "photo.jpg").read_bytes()
    pixels = images.load(data, "photo", student.preprocess)
    texts = student.embed_texts(["two dogs on snow", "a red car"])
    expected = (student.embed_images(pixels[None]) @ texts.T).flatten().tolist()
    assert [float(n) for n in re.findall(r"-?\d\.\d+", found)] == pytest.approx(expected, abs=2e-3)
