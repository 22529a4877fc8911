"""One contract for every family of dual encoders, against plain transformers."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Blip2Config,
    BlipForImageTextRetrieval,
    CLIPSegConfig,
    Siglip2ImageProcessorPil,
    Siglip2Tokenizer,
)

from crosstill import cache, data, images, teachers
from crosstill.errors import ModelError
from crosstill.teachers.base import Teacher
from crosstill.teachers.dual import BlipDual, DualEncoder
from support import matrix
from teachers import family_models
from teachers.family_models import FAMILIES, POSITIONS, TEXTS

RETRIEVAL = {"blip": (BlipDual, BlipForImageTextRetrieval)}
CPU = torch.device("cpu")
LONG = "a red cube far from " * 30


def opened(folder: Path) -> DualEncoder:
    # a BLIP that reads pairs is one by itself; its contrastive heads are asked for
    teacher = teachers.load(f"dual:{folder}" if folder.name == "blip" else folder, CPU)
    assert isinstance(teacher, RETRIEVAL.get(folder.name, (DualEncoder,))[0])
    return teacher


class Plain:
    """What transformers says of one image or one text, by the folder's own files."""

    def __init__(self, folder: Path) -> None:
        kind = RETRIEVAL[folder.name][1] if folder.name in RETRIEVAL else AutoModel
        self.name, self.model = folder.name, kind.from_pretrained(folder).eval()
        self.processor = AutoImageProcessor.from_pretrained(folder)
        reader = Siglip2Tokenizer if folder.name == "siglip2" else AutoTokenizer
        self.tokenizer = reader.from_pretrained(folder)

    def tokens(self, text: str) -> dict[str, Tensor]:
        rules = {"truncation": True, "max_length": POSITIONS, "return_tensors": "pt"}
        if not self.name.startswith("siglip"):
            return dict(self.tokenizer(text, **rules))
        padded = self.tokenizer(text, padding="max_length", **rules)
        return {"input_ids": padded["input_ids"]}

    @torch.inference_mode()
    def text(self, text: str) -> Tensor:
        if self.name not in RETRIEVAL:
            output = self.model.get_text_features(**self.tokens(text)).pooler_output
        else:
            output = self.both(text, Image.new("RGB", (32, 32)))
            output = self.model.text_proj(output.question_embeds[:, 0])
        return functional.normalize(output, dim=-1)

    @torch.inference_mode()
    def image(self, photo: Image.Image) -> Tensor:
        if self.name not in RETRIEVAL:
            output = self.model.get_image_features(**self.values(photo)).pooler_output
        else:
            output = self.both("a", photo)
            output = self.model.vision_proj(output.last_hidden_state[:, 0])
        return functional.normalize(output, dim=-1)

    def values(self, photo: Image.Image) -> dict[str, Tensor]:
        return {"pixel_values": self.processor(photo, return_tensors="pt")["pixel_values"]}

    @torch.inference_mode()
    def both(self, text: str, photo: Image.Image) -> Any:
        tokens = {k: v for k, v in self.tokens(text).items() if k != "token_type_ids"}
        return self.model(**tokens, **self.values(photo), use_itm_head=False)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "siglip":
        pytest.importorskip("sentencepiece")
    place = tmp_path_factory.mktemp("families") / request.param
    return family_models.save(FAMILIES[request.param], place)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> DualEncoder:
    return opened(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Smooth, odd-sized pictures: three sizes, so that cropping and squashing differ."""
    random = np.random.default_rng(0)
    small = [random.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in range(3)]
    sizes = [(90, 61), (47, 80), (64, 64)]
    return [Image.fromarray(a).resize(s, 3) for a, s in zip(small, sizes, strict=True)]


def pixels(teacher: DualEncoder, photos: list[Image.Image]) -> Tensor:
    rows = []
    for photo in photos:
        file = io.BytesIO()
        photo.save(file, "PNG")
        rows.append(images.load(file.getvalue(), "x.png", teacher.preprocess))
    return torch.stack(rows)


def test_images_equal_plain_transformers(
    teacher: DualEncoder, plain: Plain, photos: list[Image.Image]
) -> None:
    expected = torch.cat([plain.image(photo).mean(0, keepdim=True) for photo in photos])
    expected = functional.normalize(expected, dim=-1)
    # Our resizing may round a pixel the other way.
    rows = teacher.embed_images(pixels(teacher, photos))
    torch.testing.assert_close(rows, expected, atol=4e-3, rtol=0)
    assert (rows * expected).sum(-1).min() > 0.9999
    assert (rows @ rows.T).min() < 0.99999  # the pictures tell


def test_texts_equal_plain_transformers(teacher: DualEncoder, plain: Plain) -> None:
    texts = [*TEXTS, "A Red CUBE, two", "", LONG]
    rows = torch.cat([plain.text(text) for text in texts])  # one by one, without padding
    torch.testing.assert_close(teacher.embed_texts(texts), rows, atol=4e-6, rtol=0)
    assert (rows @ rows.T).min() < 0.9999


def test_the_longest_text(teacher: DualEncoder, plain: Plain) -> None:
    assert teacher.max_length == POSITIONS
    counts = [len(plain.tokenizer("a " * n)["input_ids"]) for n in range(1, 100)]
    fits = 1 + max(i for i, count in enumerate(counts) if count <= POSITIONS)
    texts = ["a " * fits, "a " * (fits + 5), LONG, "a"]
    assert teacher.count_truncated(texts) == 2
    assert teacher.embed_texts(texts).isfinite().all()


def test_the_logit_scale_is_the_models(
    teacher: DualEncoder, plain: Plain, photos: list[Image.Image]
) -> None:
    if plain.name in RETRIEVAL:
        assert (teacher.logit_scale, teacher.logit_bias) == (None, None)
        return
    texts, rows = TEXTS[:3], []
    for text in texts:
        rows.append(plain.both(text, photos[0]).logits_per_text[0, 0])
    assert teacher.logit_scale is not None
    assert (teacher.logit_bias is None) == (not plain.name.startswith("siglip"))
    cosines = torch.cat([plain.text(text) for text in texts]) @ plain.image(photos[0])[0]
    expected = teacher.logit_scale * cosines + (teacher.logit_bias or 0)
    torch.testing.assert_close(torch.stack(rows), expected, atol=1e-5, rtol=0)
    assert teacher.logit_scale != pytest.approx(1, abs=1e-6)


def test_it_keeps_the_teacher_contract(teacher: DualEncoder, folder: Path) -> None:
    assert isinstance(teacher, Teacher)
    assert (teacher.modalities, teacher.name) == ({"image", "text"}, folder.name)
    black = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    odd = ["\ud800", "\x00", "\n", "漢字" * 99, ""]
    for rows, count in ((teacher.embed_images(black), 3), (teacher.embed_texts(odd), 5)):
        assert (rows.shape, rows.dtype) == ((count, teacher.dim), torch.float32)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(count))
    assert teacher.embed_images(black[:0]).shape == (0, teacher.dim)
    assert teacher.embed_texts([]).shape == (0, teacher.dim)
    assert teacher.count_truncated([]) == 0


def test_rows_do_not_depend_on_their_company(teacher: DualEncoder) -> None:
    texts = [f"a {'red ' * (i % 7)}cube {i}" for i in range(150)]
    together = teacher.embed_texts(texts)
    alone = torch.cat([teacher.embed_texts([text]) for text in texts[::30]])
    torch.testing.assert_close(together[::30], alone, atol=4e-6, rtol=0)
    draw = torch.Generator().manual_seed(0)
    black = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8, generator=draw)
    one = teacher.embed_images(black[40:41])
    torch.testing.assert_close(teacher.embed_images(black)[40:41], one, atol=4e-6, rtol=0)


# what they read is of the folder and of the weights, whatever the family
HEADS = pytest.mark.parametrize("folder", matrix(FAMILIES, ["clip", "blip"]), indirect=True)


@HEADS
def test_identity_follows_the_weights_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / folder.name
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    before = opened(moved).identity()
    assert before == opened(folder).identity()
    save_file({"spare": torch.zeros(1)}, moved / "open_clip_model.safetensors")
    assert opened(moved).identity() == before
    weights = load_file(moved / "model.safetensors")
    name = next(name for name in weights if "proj" in name and name.endswith("weight"))
    weights[name].flatten()[0] += 1e-2
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    after = opened(moved).identity()
    assert {key for key in before if before[key] != after[key]} == {"weights"}


@HEADS
def test_nan_weights_and_lost_ones(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / folder.name
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    weights = load_file(moved / "model.safetensors")
    names = [name for name in weights if weights[name].ndim == 4]  # of the first convolution
    first = weights.pop(names[0])
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lack 1 parameters"):
        opened(moved)
    weights[names[0]] = torch.full_like(first, float("nan"))
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="NaN") as caught:
        opened(moved)
    assert "\n" not in str(caught.value)


def made(family: str, place: Path) -> Path:
    return family_models.save(FAMILIES[family], place / family)


@pytest.mark.parametrize("family", ["align", "blip", "siglip2"])
def test_a_cache_of_scenes(family: str, tmp_path: Path) -> None:
    teacher, pairs = opened(made(family, tmp_path)), data.open("scenes:6")
    built = cache.build(teacher, pairs, tmp_path / "cache", dtype="fp32")
    rows, texts = built.text_features(built.split("train").captions), built.captions("train")
    assert len(texts) > 9 and built.dim == teacher.dim
    torch.testing.assert_close(rows, teacher.embed_texts(texts), atol=4e-6, rtol=0)


def test_siglip_2_writes_small_letters(tmp_path: Path) -> None:
    folder = made("siglip2", tmp_path)
    teacher = opened(folder)
    rows = teacher.embed_texts(["A Red Cube", "a red cube"])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-6, rtol=0)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "Siglip2Tokenizer"}))
    again = opened(folder).embed_texts(["A Red Cube"])[0]
    torch.testing.assert_close(again, rows[0], atol=1e-6, rtol=0)


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    folder = made("siglip2", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(folder)
    with pytest.raises(ModelError, match="NaFlex; SigLIP 2 of a fixed size works"):
        teachers.load(folder)


def test_openclips_end_token_pools_the_end(tmp_path: Path) -> None:
    """In OpenCLIP's form `eos_token_id` is 2, which is no end token; texts must still differ."""
    teacher = opened(made("openclip", tmp_path))
    assert teacher.identity()["activation"] == "gelu/gelu"
    assert teacher.model.config.text_config.eos_token_id == 2
    ids = teacher.tokenizer("a red cube")["input_ids"]
    hidden = teacher.model.text_model(input_ids=torch.tensor([ids])).last_hidden_state
    expected = functional.normalize(teacher.model.text_projection(hidden[:, -1]), dim=-1)
    torch.testing.assert_close(teacher.embed_texts(["a red cube"]), expected, atol=1e-6, rtol=0)


def test_an_end_token_that_the_tokenizer_does_not_write(tmp_path: Path) -> None:
    folder = made("clip", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="all texts give one row"):
        teachers.load(folder)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    folder = made("clip", tmp_path)
    family_models.CROP.__class__(size={"shortest_edge": 48}, crop_size=48).save_pretrained(folder)
    with pytest.raises(ModelError, match="image processor, does not load") as caught:
        teachers.load(folder)
    assert "\n" not in str(caught.value)


def test_a_logit_scale_that_is_not_finite(tmp_path: Path) -> None:
    folder = made("siglip2", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="logit scale or bias is not finite"):
        teachers.load(folder)


def test_dual_is_for_models_that_read_pairs_too(tmp_path: Path) -> None:
    folder = made("clip", tmp_path)
    with pytest.raises(ModelError, match="no model that reads pairs .* leave out dual:"):
        teachers.load(f"dual:{folder}")
    with pytest.raises(ModelError, match="no such folder"):
        teachers.load("dual:./nowhere")


@pytest.mark.parametrize("kind", ["CLIPSeg", "Blip2"])
def test_what_has_such_features_and_no_joint_space(kind: str, tmp_path: Path) -> None:
    """Segmenters and captioners of transformers have the methods of a dual encoder as well."""
    if kind == "Blip2":
        folder = blip_2(tmp_path, "Blip2ForConditionalGeneration")
    else:
        folder = made("clip", tmp_path)
        CLIPSegConfig().save_pretrained(folder)
    with pytest.raises(ModelError, match=f"{kind}Model is no dual encoder"):
        teachers.load(folder)


@pytest.mark.parametrize("prefix", ["", "dual:"])
def test_blip_2_scores_by_its_best_query_and_is_refused(prefix: str, tmp_path: Path) -> None:
    folder = blip_2(tmp_path, "Blip2ForImageTextRetrieval")
    with pytest.raises(ModelError, match="a row for each query .* choose another teacher") as error:
        teachers.load(f"{prefix}{folder}")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def blip_2(place: Path, architecture: str) -> Path:
    """Write the configuration of a BLIP-2 beside the files of a CLIP."""
    folder = made("clip", place)
    Blip2Config(architectures=[architecture]).save_pretrained(folder)
    return folder
