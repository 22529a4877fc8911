"""What a student makes of a photo equals what its tower's own image processor makes of it."""

import io
import logging
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from families import IMAGE, Family
from PIL import Image
from transformers import (
    AutoModel,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    LevitImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)

from crosstill import images, students
from crosstill.students import image_part
from crosstill.students.student_config import ImageTowerConfig, StudentConfig

FAMILIES = {family.type: family for family in IMAGE}
SQUARE = {"height": 128, "width": 128}
IMAGENET = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.23, 0.22, 0.21]}


def photo() -> tuple[bytes, Image.Image]:
    """Soft waves, each channel its own, which filters of any kind see alike."""
    y, x = np.mgrid[:180, :250]
    waves = [np.sin(x / (20 + 9 * band) + band) * np.cos(y / 25 + band) for band in range(3)]
    pixels = (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), Image.fromarray(pixels)


def saved(family: Family, folder: Path, processor: object) -> Path:
    families.save_image(family, folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "processor"),
    [
        ("convnext", ConvNextImageProcessorPil(size={"shortest_edge": 112}, crop_pct=0.875)),
        ("resnet", ConvNextImageProcessorPil(size={"shortest_edge": 384}, **IMAGENET)),
        ("levit", LevitImageProcessorPil(size={"shortest_edge": 128}, crop_size=SQUARE)),
        ("efficientnet", EfficientNetImageProcessorPil(size=SQUARE, include_top=True, **IMAGENET)),
        ("efficientnet", EfficientNetImageProcessorPil(size=SQUARE, do_normalize=False)),
        (
            "efficientnet",
            EfficientNetImageProcessorPil(size=SQUARE, include_top=False, rescale_offset=True),
        ),
        ("mobilevit", MobileViTImageProcessorPil(size={"shortest_edge": 144}, crop_size=SQUARE)),
    ],
    ids=["share", "warped", "levit", "twice", "divided", "offset", "blue-first"],
)
def test_it_sees_what_the_processor_shows(kind: str, processor, tmp_path: Path) -> None:
    folder = saved(FAMILIES[kind], tmp_path / kind, processor)
    part = image_part(ImageTowerConfig(source=str(folder)))
    data, plain = photo()
    ours = images.normalise(images.load(data, "photo", part.preprocess)[None], part.preprocess)
    theirs = processor(images=plain, return_tensors="pt")["pixel_values"]
    blue_first = bool(getattr(processor, "do_flip_channel_order", False))
    seen = theirs.flip(1) if blue_first else theirs
    spread = 255 * torch.tensor(part.preprocess.std).min()
    assert ours.shape == seen.shape
    assert (ours - seen).abs().max() * spread < 4  # levels of 255
    # a small tower at random hardly tells photos apart; its first step does
    with torch.inference_mode():
        found, first = first_step(part.tower)(seen), first_step(AutoModel.from_pretrained(folder))
        torch.testing.assert_close(found, first(theirs), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, first(theirs.flip(1)), rtol=1e-2, atol=1e-2)


def first_step(tower: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))


def test_a_nearest_pixel_filter_is_replaced_and_named(tmp_path: Path, caplog) -> None:
    processor = EfficientNetImageProcessorPil(size=SQUARE, resample=0, include_top=False)
    folder = saved(FAMILIES["efficientnet"], tmp_path / "tower", processor)
    with caplog.at_level(logging.WARNING):
        part = image_part(ImageTowerConfig(source=str(folder)))
    assert "nearest-pixel filter is replaced by a bilinear one" in caplog.text
    assert part.preprocess.interpolation == "bilinear"
    assert part.preprocess.size == (128, 128)


def test_a_stand_in_is_named(tmp_path: Path, caplog) -> None:
    folder = saved(FAMILIES["vit"], tmp_path / "tower", ViTImageProcessorPil(do_resize=False))
    with caplog.at_level(logging.WARNING):
        part = image_part(ImageTowerConfig(source=str(folder), pooling="cls"))
    assert "images of any size" in caplog.text
    assert "photos are squashed to 32 x 32 and scaled to -1..1" in caplog.text
    assert part.preprocess.size == (32, 32)


def test_a_saved_student_has_its_channels_in_order(tmp_path: Path) -> None:
    processor = MobileViTImageProcessorPil(size={"shortest_edge": 144}, crop_size=SQUARE)
    folder = saved(FAMILIES["mobilevit"], tmp_path / "tower", processor)
    told = {"image": {"source": str(folder)}, "text": {"config": families.TEXT[0].config}}
    config = StudentConfig.model_validate(told)
    student = students.build(config, 16, families.CAPTIONS).eval()
    student.save(tmp_path / "student")
    again = students.load(tmp_path / "student")
    plain = first_step(AutoModel.from_pretrained(folder)).weight
    assert torch.equal(first_step(again.image_tower).weight, plain.flip(1))
