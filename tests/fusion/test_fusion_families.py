import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipModel,
    BridgeTowerForContrastiveLearning,
)

from crosstill import teachers
from crosstill.errors import ConfigError, ModelError
from crosstill.fusion.families import Blip, BridgeTower, Pretrained, Vilt
from crosstill.fusion.matcher import FusionTeacher
from crosstill.images import normalise
from crosstill.teachers.base import Teacher
from crosstill.teachers.dual import BlipDual, BridgeTowerDual, DualEncoder
from support import matrix
from teachers import fusion_models
from teachers.fusion_models import TEXTS

CLASSES: dict[str, type[Pretrained]] = {
    "vilt": Vilt,
    "blip": Blip,
    "bridgetower": BridgeTower,
    "bridgetower-unshared": BridgeTower,
}
CLOSE = {"atol": 1e-6, "rtol": 0}
ALL = torch.cartesian_prod(torch.arange(3), torch.arange(4))  # 3 images x 4 texts


# without shared layers a BridgeTower differs inside transformers alone
@pytest.fixture(scope="module", params=matrix(CLASSES, [*CLASSES][:3]))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fusion_models.save(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Pretrained:
    return opened(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return CLASSES[folder.name].architecture.from_pretrained(folder).eval()


@pytest.fixture
def blip_folder(tmp_path: Path) -> Path:
    """A folder to damage."""
    return fusion_models.save("blip", tmp_path / "blip")


def opened(folder: Path) -> Pretrained:
    return CLASSES[folder.name](folder, folder.name, torch.device("cpu"))


def photos(count: int = 3, *sizes: tuple[int, int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = sizes or ((32, 32),) * count
    return [torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=draw) for s in shapes]


def reference(plain: Any, model: Pretrained, pixels: Tensor, text: str) -> float:
    """One pair through transformers."""
    tokens = model.tokenizer(
        text, return_tensors="pt", truncation=True, max_length=model.max_length
    )
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    inputs["pixel_values"] = normalise(pixels[None], model.preprocess)
    if model.family == "vilt":
        inputs["pixel_mask"] = torch.ones(1, *pixels.shape[1:], dtype=torch.int64)
    return logit(plain, inputs).item()


@torch.inference_mode()
def logit(plain: Any, inputs: dict[str, Tensor]) -> Tensor:
    output = plain(**inputs)
    rows = output.itm_score if "itm_score" in output else output.logits
    return rows[:, 1] - rows[:, 0] if rows.shape[1] == 2 else rows[:, 0]


def table(plain: Any, model: Pretrained, pixels: list[Tensor]) -> Tensor:
    return torch.tensor([reference(plain, model, pixels[i], TEXTS[t]) for i, t in ALL.tolist()])


def test_one_pair_at_a_time(model: Pretrained, plain: Any) -> None:
    pixels = photos()
    ours = [model.score([pixels[i]], [TEXTS[t]]) for i, t in ALL.tolist()]
    expected = table(plain, model, pixels)
    torch.testing.assert_close(torch.cat(ours), expected, **CLOSE)
    assert expected.view(3, 4).std(0).min() > 1e-3 < expected.view(3, 4).std(1).min()


def test_a_batch_of_texts_of_all_lengths(model: Pretrained, plain: Any) -> None:
    pixels = photos(4)
    texts = [*TEXTS[:3], "far from a red ball " * 30]
    expected = [reference(plain, model, i, t) for i, t in zip(pixels, texts, strict=True)]
    assert model.count_truncated(texts) == 1
    torch.testing.assert_close(model.score(pixels, texts), torch.tensor(expected), **CLOSE)
    inside = model.tokenize(texts)
    together = model.score_states(
        model.project(model.encode_images(torch.stack(pixels)), "image"),
        model.project(model.encode_texts(inside), "text"),
    )
    torch.testing.assert_close(together.detach(), torch.tensor(expected), **CLOSE)


def test_all_pairs_with_the_towers_run_once(
    model: Pretrained, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, looks = photos(), []
    look = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda x: looks.append(len(x)) or look(x))
    images, texts = model.image_states(pixels), model.text_states(TEXTS)
    assert sum(looks) == 3
    scores = model.score_pairs(images, texts, ALL)
    torch.testing.assert_close(scores, table(plain, model, pixels), **CLOSE)
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.score_pairs(images, texts, ALL[mixed]), scores[mixed], **CLOSE)


SIZES = (32, 32), (32, 48), (40, 32)


@pytest.fixture(scope="module")
def vilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrained, Any]:
    folder = fusion_models.save("vilt", tmp_path_factory.mktemp("models") / "vilt")
    return opened(folder), Vilt.architecture.from_pretrained(folder).eval()


def test_vilt_reads_images_of_all_shapes(vilt: tuple[Pretrained, Any]) -> None:
    model, plain = vilt
    pixels = photos(3, *SIZES)
    images = model.image_states(pixels)
    assert images.mask.sum(1).tolist() == [17, 25, 21]
    scores = model.score_pairs(images, model.text_states(TEXTS), ALL)
    torch.testing.assert_close(scores, table(plain, model, pixels), **CLOSE)


def test_vilt_equals_a_padded_batch_of_transformers(vilt: tuple[Pretrained, Any]) -> None:
    model, plain = vilt
    pixels = photos(3, *SIZES)
    values, mask = torch.zeros(3, 3, 40, 48), torch.zeros(3, 40, 48, dtype=torch.int64)
    for row, image in enumerate(pixels):
        height, width = image.shape[1:]
        values[row, :, :height, :width] = normalise(image[None], model.preprocess)[0]
        mask[row, :height, :width] = 1
    tokens = model.tokenize(TEXTS[:3])
    inputs = {"input_ids": tokens.hidden, "attention_mask": tokens.mask}
    expected = logit(plain, {**inputs, "pixel_values": values, "pixel_mask": mask})
    torch.testing.assert_close(model.score(pixels, TEXTS[:3]), expected, **CLOSE)


def renamed(state: dict[str, Tensor], family: str, kept: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the kept fusion layers under their new numbers, and all other weights."""
    stack, links = {
        "vilt": (r"vilt\.encoder\.layer\.", None),
        "blip": (r"text_encoder\.encoder\.layer\.", None),
        "bridgetower": (
            r"cross_modal_\w+_layers\.|cross_modal_\w+_transform\.(?=\d)",
            r"cross_modal_\w+_link_tower\.",
        ),
    }[family]
    bridges = {layer - 1: row - 1 for row, layer in enumerate(kept) if row}
    for pattern, numbers in ((stack, {n: row for row, n in enumerate(kept)}), (links, bridges)):
        for name in [name for name in state if pattern and re.search(pattern, name)]:
            head, number, tail = re.split(r"((?<=\.)\d+)(?=\.)", name, maxsplit=1)
            value = state.pop(name)
            if int(number) in numbers:
                yield f"{head}{numbers[int(number)]}{tail}", value
    yield from state.items()


@pytest.mark.parametrize("kept", matrix([[0, 2], [1, 2], [2]], [[0, 2]]), ids=str)
def test_a_cut_model_is_transformers_with_fewer_layers(
    model: Pretrained, plain: Any, kept: list[int]
) -> None:
    config = copy.deepcopy(plain.config)
    owner = config.text_config if model.family == "blip" else config
    owner.num_hidden_layers = len(kept)
    small = type(plain)(config).eval()
    small.load_state_dict(dict(renamed(plain.state_dict(), model.family, kept)))
    cut = model.cut(kept)
    assert (cut.depth, model.depth) == (len(kept), fusion_models.LAYERS)
    pixels = photos()
    scores = cut.score_pairs(cut.image_states(pixels), cut.text_states(TEXTS), ALL)
    torch.testing.assert_close(scores, table(small, model, pixels), **CLOSE)
    assert (scores - table(plain, model, pixels)).abs().max() > 1e-3


def test_a_cut_model_survives_saving(model: Pretrained, tmp_path: Path) -> None:
    cut, pixels = model.cut([0, 2]), photos()
    cut.licence = "mit"
    cut.save(tmp_path / model.name)
    again = opened(tmp_path / model.name)
    assert again.identity() == cut.identity() != model.identity()
    assert (again.licence, again.preprocess, again.depth) == ("mit", cut.preprocess, 2)
    scores = cut.score(pixels, TEXTS[:3])
    torch.testing.assert_close(again.score(pixels, TEXTS[:3]), scores, **CLOSE)
    assert not list(tmp_path.glob("*/.writing-*"))


def test_plain_transformers_loads_what_is_saved(model: Pretrained, tmp_path: Path) -> None:
    cut, pixels = model.cut([0, 2]), photos()
    cut.save(tmp_path)
    plain, report = type(cut).architecture.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(
        torch.tensor([reference(plain.eval(), model, i, TEXTS[0]) for i in pixels]),
        cut.score(pixels, TEXTS[:1] * 3),
        **CLOSE,
    )
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS) == model.tokenizer(TEXTS)
    assert AutoImageProcessor.from_pretrained(tmp_path).do_resize


def test_a_deeper_model_s_towers_serve_the_cut_one(model: Pretrained) -> None:
    cut, pixels = model.cut([0, 2]), torch.stack(photos())
    own, shared = (
        cut.project(cut.encode_images(pixels), "image"),
        cut.project(model.encode_images(pixels), "image"),
    )
    torch.testing.assert_close(own.hidden, shared.hidden)


@pytest.mark.parametrize("layers", [[], [0, 3], [-1], [1, 1]], ids=str)
def test_layers_that_cannot_be_kept(model: Pretrained, layers: list[int]) -> None:
    with pytest.raises(ConfigError, match="fusion layers 0 to 2") as caught:
        model.cut(layers)
    assert "\n" not in str(caught.value)


def test_bridgetower_s_first_layer_stays_first(tmp_path: Path) -> None:
    model = opened(fusion_models.save("bridgetower", tmp_path / "bridgetower"))
    with pytest.raises(ConfigError, match=r"layers = \[2, 0\]: no bridge"):
        model.cut([2, 0])


def test_only_the_fusion_part_learns(model: Pretrained) -> None:
    cut = model.cut([0, 2])
    assert not cut.towers_frozen
    assert cut.freeze_towers().towers_frozen
    cut.train()
    images = cut.project(cut.encode_images(torch.stack(photos())), "image")
    cut.score_states(
        images, cut.project(cut.encode_texts(cut.tokenize(TEXTS[:3])), "text")
    ).sum().backward()
    towers = {id(p) for tower in cut.towers() for p in tower.parameters()}
    learns = {name: p.grad for name, p in cut.named_parameters() if p.requires_grad}
    assert learns
    assert all(grad is not None and grad.isfinite().all() for grad in learns.values())
    assert sum(grad.abs().max() > 0 for grad in learns.values() if grad is not None) > 20
    assert all(p.grad is None for p in cut.parameters() if id(p) in towers)
    parts = cut.parameters_by_part()
    assert parts["towers"] + parts["fusion"] == parts["total"] < model.parameter_count()


def test_teachers_load_finds_it(folder: Path) -> None:
    found = teachers.load(folder, torch.device("cpu"))
    assert type(found) is CLASSES[folder.name]
    assert isinstance(found, FusionTeacher)
    assert found.identity() == opened(folder).identity()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("tokenizer*", "no tokenizer"),
        ("*processor_config.json", "no image processor"),
        ("*.safetensors", "no .safetensors weights"),
        ("config.json", "no config.json"),
    ],
)
def test_a_folder_that_lacks_a_part(blip_folder: Path, lost: str, message: str) -> None:
    for path in blip_folder.glob(lost):
        path.unlink()
    with pytest.raises(ModelError, match=message) as caught:
        opened(blip_folder)
    assert str(blip_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_kind(blip_folder: Path) -> None:
    with pytest.raises(ModelError, match="a blip model; vilt is needed"):
        Vilt(blip_folder, "blip")
    words = len(AutoTokenizer.from_pretrained(blip_folder))
    BlipModel(fusion_models.blip(words).config).save_pretrained(blip_folder)
    with pytest.raises(ModelError, match="the weights lack"):
        opened(blip_folder)


def test_an_image_processor_of_another_size(blip_folder: Path) -> None:
    BlipImageProcessorPil(size={"height": 24, "width": 32}).save_pretrained(blip_folder)
    with pytest.raises(ModelError, match="gives images of 24 x 32, and .* takes 32 x 32"):
        opened(blip_folder)
    _, fit = fusion_models.FAMILIES["vilt"]
    fit.save_pretrained(blip_folder)
    with pytest.raises(ModelError, match="images of many sizes"):
        opened(blip_folder)


def test_blip_s_contrastive_heads_are_a_dual_encoder(blip_folder: Path) -> None:
    dual = BlipDual(blip_folder, "blip", torch.device("cpu"))
    plain = BlipForImageTextRetrieval.from_pretrained(blip_folder).eval()
    pixels, tokens = torch.stack(photos()), dual.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = plain(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=normalise(pixels, dual.preprocess),
            use_itm_head=False,
        )
        text = functional.normalize(plain.text_proj(output.question_embeds[:, 0]), dim=-1)
    images, texts = dual.embed_images(pixels), dual.embed_texts(TEXTS)
    torch.testing.assert_close(images @ texts.T, output.itm_score, **CLOSE)
    torch.testing.assert_close(texts, text, **CLOSE)
    assert isinstance(dual, Teacher)
    assert (dual.dim, dual.modalities) == (24, {"image", "text"})
    assert dual.identity()["family"] == "blip-itc"
    unused = [n for n, _ in plain.named_parameters() if "crossattention" in n or "itm_head" in n]
    spared = sum(plain.get_parameter(name).numel() for name in unused)
    assert dual.parameter_count() == plain.num_parameters() - spared < plain.num_parameters()


def test_bridgetower_s_contrastive_heads_are_a_dual_encoder(tmp_path: Path) -> None:
    folder = fusion_models.save("bridgetower-dual", tmp_path)
    dual = BridgeTowerDual(folder, "bridgetower", torch.device("cpu"))
    plain = BridgeTowerForContrastiveLearning.from_pretrained(folder).eval()
    pixels = torch.stack(photos(4))
    for row, text in enumerate(TEXTS):
        tokens = dual.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = plain(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                pixel_values=normalise(pixels[row : row + 1], dual.preprocess),
            )
        torch.testing.assert_close(dual.embed_texts(TEXTS)[row], output.text_embeds[0], **CLOSE)
        torch.testing.assert_close(dual.embed_images(pixels)[row], output.image_embeds[0], **CLOSE)
    assert isinstance(dual, Teacher)
    assert dual.max_length == 39
    assert dual.embed_texts(["far from a red ball " * 30]).isfinite().all()
    assert dual.parameter_count() < plain.num_parameters()


def test_a_blip_dual_encoder_loads_as_before(blip_folder: Path) -> None:
    with pytest.raises(ModelError, match="the weights lack"):
        DualEncoder(blip_folder, "blip")
    words = len(AutoTokenizer.from_pretrained(blip_folder))
    whole = fusion_models.lively(BlipModel(fusion_models.blip(words).config)).eval()
    whole.save_pretrained(blip_folder)
    dual = teachers.load(blip_folder, torch.device("cpu"))
    assert type(dual) is DualEncoder
    tokens = dual.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.inference_mode():
        rows = whole.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    expected = functional.normalize(rows, dim=-1)
    torch.testing.assert_close(dual.embed_texts(TEXTS[:1]), expected, atol=2e-6, rtol=0)


def test_bridgetower_is_no_plain_dual_encoder(tmp_path: Path) -> None:
    folder = fusion_models.save("bridgetower-dual", tmp_path)
    with pytest.raises(ModelError, match="BridgeTowerModel is no dual encoder"):
        DualEncoder(folder, "bridgetower")
