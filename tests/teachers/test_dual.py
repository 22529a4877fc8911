import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BertConfig, BertModel

from crosstill import images, teachers
from crosstill.errors import ModelError
from crosstill.teachers.base import Teacher
from crosstill.teachers.dual import DualEncoder


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Smooth, odd-sized pictures: three sizes, so that cropping and squashing differ."""
    random = np.random.default_rng(0)
    small = [random.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in range(3)]
    sizes = [(90, 61), (47, 80), (64, 64)]
    return [Image.fromarray(a).resize(s, 3) for a, s in zip(small, sizes, strict=True)]


def _pixels(teacher: Teacher, photos: list[Image.Image]) -> torch.Tensor:
    rows = []
    for photo in photos:
        file = io.BytesIO()
        photo.save(file, "PNG")
        rows.append(images.load(file.getvalue(), "x.png", teacher.preprocess))
    return torch.stack(rows)


def test_images_equal_plain_transformers(dual_folder: Path, photos: list[Image.Image]) -> None:
    teacher = teachers.load(dual_folder)
    processor = AutoImageProcessor.from_pretrained(dual_folder)
    values = processor(photos, return_tensors="pt")
    with torch.inference_mode():
        plain = AutoModel.from_pretrained(dual_folder).eval().get_image_features(**values)
    expected = functional.normalize(plain.pooler_output, dim=-1)
    # Our resizing may round a pixel the other way.
    rows = teacher.embed_images(_pixels(teacher, photos))
    torch.testing.assert_close(rows, expected, atol=2e-3, rtol=0)
    assert (rows * expected).sum(-1).min() > 0.9999


def test_texts_equal_plain_transformers(dual_folder: Path, texts: list[str]) -> None:
    teacher = teachers.load(dual_folder)
    tokenizer = AutoTokenizer.from_pretrained(dual_folder)
    plain = AutoModel.from_pretrained(dual_folder).eval()
    expected = []
    for text in texts:  # one by one, so that padding cannot hide a mistake
        if plain.config.model_type == "siglip":
            rules = {"padding": "max_length", "max_length": 16, "truncation": True}
            tokens = {"input_ids": tokenizer(text, return_tensors="pt", **rules)["input_ids"]}
        else:
            tokens = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            expected.append(plain.get_text_features(**tokens).pooler_output)
    rows = functional.normalize(torch.cat(expected), dim=-1)
    torch.testing.assert_close(teacher.embed_texts(texts), rows, atol=2e-6, rtol=0)


def test_it_keeps_the_teacher_contract(dual_folder: Path) -> None:
    teacher = teachers.load(dual_folder)
    assert isinstance(teacher, Teacher)
    assert teacher.modalities == {"image", "text"}
    assert teacher.name == dual_folder.name
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    for rows in (teacher.embed_images(pixels), teacher.embed_texts(["a", "b", ""])):
        assert rows.shape == (3, teacher.dim)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3))
    assert teacher.embed_images(pixels[:0]).shape == (0, teacher.dim)
    assert teacher.embed_texts([]).shape == (0, teacher.dim)


def test_rows_do_not_depend_on_their_company(dual_folder: Path) -> None:
    teacher = teachers.load(dual_folder)
    texts = [f"a {'red ' * (i % 7)}cube {i}" for i in range(150)]
    together = teacher.embed_texts(texts)
    alone = torch.cat([teacher.embed_texts([text]) for text in texts[::30]])
    torch.testing.assert_close(together[::30], alone, atol=2e-6, rtol=0)


def test_identity_follows_the_weights_and_nothing_else(pair_folder: Path) -> None:
    first = teachers.load(pair_folder)
    before = first.identity()
    first.embed_texts(["padded", "to some length, and truncated " * 30])
    moved = pair_folder.rename(pair_folder.with_name("moved"))
    assert teachers.load(moved).identity() == before
    weights = load_file(moved / "model.safetensors")
    weights["text_projection.weight"][0, 0] += 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    after = teachers.load(moved).identity()
    assert {key for key in before if before[key] != after[key]} == {"weights"}


def test_count_truncated(dual_folder: Path) -> None:
    teacher = teachers.load(dual_folder)
    assert isinstance(teacher, DualEncoder)
    texts = ["cube", "cube " * 200, "red", "red " * 300]
    assert teacher.count_truncated(texts) == 2
    assert teacher.max_length in (16, 20, 40)


def test_odd_texts_embed(dual_folder: Path) -> None:
    assert (
        teachers.load(dual_folder)
        .embed_texts(["\ud800", "\x00", "\n", "漢字" * 99])
        .isfinite()
        .all()
    )


def test_licence_comes_from_the_model_card(pair_folder: Path) -> None:
    assert teachers.load(pair_folder).licence is None
    (pair_folder / "README.md").write_text("---\ntags:\n- x\nlicense: mit\n---\n# A model\n")
    assert teachers.load(pair_folder).licence == "mit"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer*", "no tokenizer"),
        ("*processor_config.json", "no image processor"),
        ("*.safetensors", "no .safetensors weights"),
        ("config.json", "no config.json"),
    ],
)
def test_a_folder_that_lacks_a_part(pair_folder: Path, lost: str, message: str) -> None:
    for path in pair_folder.glob(lost):
        path.unlink()
    with pytest.raises(ModelError, match=message) as caught:
        teachers.load(pair_folder)
    assert str(pair_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_damaged_or_incomplete(pair_folder: Path) -> None:
    path = pair_folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="does not load"):
        teachers.load(pair_folder)
    path.write_bytes(whole)
    weights = load_file(path)
    del weights["text_projection.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 parameters .* text_projection\.weight"):
        teachers.load(pair_folder)


def test_nan_weights_are_not_taken_for_a_teacher(pair_folder: Path) -> None:
    path = pair_folder / "model.safetensors"
    weights = load_file(path)
    weights["text_projection.weight"].fill_(float("nan"))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        teachers.load(pair_folder)


def test_a_single_tower_is_no_dual_encoder(pair_folder: Path) -> None:
    config = BertConfig(vocab_size=150, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(pair_folder)
    with pytest.raises(ModelError, match="BertModel is no dual encoder"):
        teachers.load(pair_folder)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist(source: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        teachers.load(source)


def test_a_hub_id_offline_is_one_quick_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        teachers.load("someone/some-model-that-is-nowhere")
    assert time.perf_counter() - start < 5
    assert caught.value.__suppress_context__


def test_the_shared_teacher_loads(shared: Path) -> None:
    teacher = teachers.load(shared / "models" / "teacher-flickr8k")
    assert (teacher.dim, teacher.name) == (512, "teacher-flickr8k")
    assert teacher.preprocess == images.Preprocess(size=(224, 224))
    assert teacher.identity()["activation"] == "relu6/gelu"
    near = teacher.embed_texts(["A dog runs.", "A dog is running.", "Two men play chess."])
    assert near[0] @ near[1] > 0.8 > near[0] @ near[2]
