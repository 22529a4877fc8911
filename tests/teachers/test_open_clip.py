"""OpenCLIP's models against its own library; the extra `open-clip` brings it."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from crosstill import images
from crosstill.errors import ConfigError, ModelError
from crosstill.teachers.base import Teacher
from crosstill.teachers.open_clip import OpenClip, holds

CPU = torch.device("cpu")
IMAGE = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
COCA = {
    "custom_text": True,
    "vision_cfg": {
        **IMAGE,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"vision_cfg": IMAGE, "text_cfg": TEXT},
    "siglip": {"vision_cfg": IMAGE, "text_cfg": TEXT, "init_logit_bias": -10},
    "coca": COCA,
}
TEXTS = ["a red cube", "A Blue Ball left of a red cube", "x " * 50, "ünüsual 🎈", ""]
SQUASH = {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("open_clip")


def save(library: Any, folder: Path, model: str, **preprocess: Any) -> Path:
    folder.mkdir()
    config = {"model_cfg": {"embed_dim": 24, **MODELS[model]}}
    record = {**config, "preprocess_cfg": {"size": 32, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    torch.manual_seed(0)
    made = library.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    state = {name: value.contiguous() for name, value in made.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("preprocess", [{}, SQUASH], ids=["crop", "squash"])
@pytest.mark.parametrize("model", MODELS)
def test_rows_equal_the_librarys(
    library: Any, model: str, preprocess: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(library, tmp_path / "it", model, **preprocess)
    assert holds(folder) and holds("open_clip:ViT-B-32:openai")
    teacher = OpenClip(folder, device=CPU)
    assert isinstance(teacher, Teacher) and (teacher.name, teacher.dim) == ("it", 24)
    plain, _, transform = library.create_model_and_transforms(f"local-dir:{folder}")
    read = library.get_tokenizer(f"local-dir:{folder}")
    random = np.random.default_rng(0)
    sizes = [(90, 62), (46, 69), (64, 64)]  # an even rest, so that both cut the same centre
    small = [random.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in sizes]
    photos = [Image.fromarray(a).resize(s, 3) for a, s in zip(small, sizes, strict=True)]
    with torch.inference_mode():
        texts = torch.cat([plain.eval().encode_text(read([text])) for text in TEXTS])
        shown = torch.cat([plain.encode_image(transform(photo)[None]) for photo in photos])
    expected = functional.normalize(texts, dim=-1)
    torch.testing.assert_close(teacher.embed_texts(TEXTS), expected, atol=2e-6, rtol=0)
    rows = []
    for photo in photos:
        file = io.BytesIO()
        photo.save(file, "PNG")
        rows.append(images.load(file.getvalue(), "x.png", teacher.preprocess))
    cosines = (teacher.embed_images(torch.stack(rows)) * functional.normalize(shown, dim=-1)).sum(1)
    assert cosines.min() > 0.9999
    assert teacher.count_truncated(TEXTS) == 1
    assert teacher.logit_scale == pytest.approx(1 / 0.07)
    assert teacher.logit_bias == (-10 if model == "siglip" else None)
    before = teacher.identity()
    assert OpenClip(folder.rename(tmp_path / "moved"), device=CPU).identity() == before


def test_what_is_refused(library: Any, tmp_path: Path) -> None:
    folder = save(library, tmp_path / "it", "clip", resize_mode="longest")
    pickled = tmp_path / "weights.pt"
    pickled.write_bytes(b"")
    for source, named in (
        (str(folder), "resize_mode='longest'"),
        ("open_clip:ViT-B-33:openai", "no model 'ViT-B-33'"),
        ("open_clip:ViT-B-32:openia", "known: openai"),
        ("open_clip:ViT-B-32:openai", "name 'ViT-B-32-quickgelu' instead"),
        (f"open_clip:ViT-B-32:{pickled}", "pickled ones are never read"),
    ):
        with pytest.raises(ModelError, match=named) as caught:
            OpenClip(source, device=CPU)
        assert "\n" not in str(caught.value)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"0 \.safetensors"):
        OpenClip(folder, device=CPU)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'crosstill\[open-clip\]'"):
        OpenClip("open_clip:ViT-B-32:openai")


def test_a_folder_of_both_forms_is_read_by_transformers(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert holds(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not holds(tmp_path)
