"""A student that sets for itself how its photos are resized, cropped and normalised."""

import numpy as np
import pytest
import torch
from test_student_photos import FAMILIES, photo, saved
from transformers import ViTImageProcessorPil

from crosstill import data, evaluate, images, students
from crosstill.bundle import Bundle, Encoder
from crosstill.errors import ConfigError
from crosstill.images import Preprocess
from crosstill.students.student_config import PRESETS, ImageTowerConfig
from crosstill.train import Run
from support import FAST
from verbs import TOML, crosstill, refusal

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHOSEN = f"""
[image.preprocess]
size = [16, 16]
resize = "crop"
shorter = 20
interpolation = "bilinear"
mean = {list(MEAN)}
std = {list(STD)}
"""


def test_paper_takes_the_photos_of_the_authors_code():
    chosen = PRESETS["paper"].image.preprocess
    assert chosen.model_dump() == {
        "size": (224, 224),
        "resize": "crop",
        "shorter": 256,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
    }


def test_what_is_left_out_stays_as_the_folder_has_it(tmp_path):
    square = {"height": 32, "width": 32}
    processor = ViTImageProcessorPil(size=square, image_mean=[0.1] * 3, image_std=[0.7] * 3)
    folder = saved(FAMILIES["vit"], tmp_path / "vit", processor)
    own = students.image_part(ImageTowerConfig(source=str(folder), pooling="cls")).preprocess
    changes = {"resize": "crop", "shorter": 40}
    config = ImageTowerConfig(source=str(folder), pooling="cls", preprocess=changes)
    part = students.image_part(config)
    assert part.preprocess == Preprocess(**{**vars(own), **changes})
    assert own.resize == "squash" and part.preprocess.mean == (0.1, 0.1, 0.1)
    file, _ = photo()
    assert not torch.equal(images.load(file, "", part.preprocess), images.load(file, "", own))


def test_a_run_and_its_bundle_take_the_chosen_photos(cached, tmp_path):
    (tmp_path / "small.toml").write_text(TOML + CHOSEN)
    words = [word for change in FAST for word in ("--set", change)]
    crosstill(
        *("train", cached.folder, "--student", tmp_path / "small.toml"),
        *(*words, "--out", tmp_path / "run"),
    )
    best = Run(tmp_path / "run").best
    wanted = Preprocess(
        size=(16, 16), resize="crop", shorter=20, interpolation="bilinear", mean=MEAN, std=STD
    )
    assert best.preprocess == wanted == Run(tmp_path / "run").untrained.preprocess
    crosstill("export", tmp_path / "run", "--to", "onnx", "--out", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert Preprocess.from_json(bundle.record["preprocess"]) == wanted
    pairs = data.open("scenes:60").split("val")
    files = [pairs.read(example) for example in pairs.examples]
    ours = best.embed_images(torch.stack([images.load(file, "", wanted) for file in files]))
    theirs = evaluate.embed(evaluate.open_model(tmp_path / "bundle"), pairs).image
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    alone = Encoder(bundle)
    seen = np.stack([images.load(file, "", bundle.preprocess).numpy() for file in files])
    np.testing.assert_allclose(alone.encode_images(seen), ours.numpy(), rtol=0, atol=1e-5)
    figures = crosstill("evaluate", tmp_path / "bundle", "scenes:60", "--split", "val").stdout
    assert f"{Run(tmp_path / 'run').metrics['best']['rsum']:.2f}" in figures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[image.preprocess]\nsise = [16, 16]", "did you mean 'image.preprocess.size'"),
        ('[image.preprocess]\nresize = "fit"', "image.preprocess.resize"),
        (
            '[image.preprocess]\nresize = "crop"\nshorter = 9',
            "preprocess shorter: 9 is not possible",
        ),
        ("[image.preprocess]\nsize = [24, 24]", "photos of (24, 24) pixels do not fit ViTModel"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(cached, tmp_path, text, message):
    (tmp_path / "small.toml").write_text(f"{TOML}\n{text}\n")
    typed = ("train", cached.folder, "--student", tmp_path / "small.toml", "--out", tmp_path / "r")
    assert message in refusal(*typed)
    with pytest.raises(ConfigError):
        students.build(tmp_path / "small.toml", captions=["a"])
