"""`crosstill cache` with fusion teachers: what it prints, and one line for wrong input."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViltConfig, ViltForImageAndTextRetrieval, ViltImageProcessorPil

from crosstill import cache, data, fusion, images, students, teachers
from crosstill.data import scenes as scenery
from crosstill.towers import vocabulary
from support import small_config
from verbs import crosstill, refusal


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A dataset of files, a fusion model, a dual encoder with its cache, and a score cache."""
    home = tmp_path_factory.mktemp("home")
    scenery.write(home / "photos", 20)
    pairs = data.open(home / "photos/dataset.json")
    texts = [text for example in pairs.examples for text in example.captions]
    vilt(texts, home / "fusion")
    students.build(small_config(), dim=16, captions=texts).save(home / "dual")
    listing = home / "photos/dataset.json"
    crosstill("cache", home / "dual", listing, "--out", home / "features")
    made = crosstill("cache", home / "fusion", listing, "--out", home / "scores", *FEW)
    (home / "said").write_text(made.stdout)
    return home


FEW = ["--false", 4, "--false-images", 2]


def vilt(texts: list[str], folder: Path) -> None:
    tokenizer = vocabulary.train(texts, 120)
    tokenizer.model_max_length = 40
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    config = ViltConfig(vocab_size=len(tokenizer), **small, **image)
    ViltForImageAndTextRetrieval(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=8).save_pretrained(folder)


def build(home: Path, teacher: object, *options: object) -> list[object]:
    return ["cache", teacher, home / "photos/dataset.json", *options]


def test_a_fusion_teacher_fills_a_score_cache_with_its_own_scores(home):
    scores = cache.open(home / "scores")
    assert isinstance(scores, fusion.ScoreCache) and scores.teacher["parameters"] > 1000
    said = (home / "said").read_text()
    assert f"whole; 20 images (test 2, train 16, val 2), 100 captions, {len(scores.scores)}" in said
    assert "pairs (F = 4 false captions an image, 2 images a caption), teacher fusion" in said
    model = teachers.load(home / "fusion", torch.device("cpu"))
    pairs = data.open(home / "photos/dataset.json")
    of = {example.image_id: example for example in pairs.examples}
    for pair in range(0, len(scores.scores), 97):
        example = of[scores.image_ids[scores.pair_images[pair]]]
        photo = images.load(pairs.read(example), example.path, model.preprocess)
        expected = model.score([photo], [scores.texts[scores.pair_captions[pair]]])
        torch.testing.assert_close(scores.scores[pair : pair + 1], expected, atol=1e-5, rtol=1e-5)


def test_verify_and_a_second_build_find_it_whole(home):
    said = (home / "said").read_text()
    assert crosstill("cache", "verify", home / "scores").stdout == said
    again = build(home, home / "fusion", "--out", home / "scores", *FEW)
    assert crosstill(*again).stdout == said
    assert "16 wide" in crosstill("cache", "verify", home / "features").stdout
    assert "no finished cache there" in refusal("cache", "verify", home / "photos")


def test_verify_names_the_damaged_file(home, tmp_path):
    shutil.copytree(home / "scores", tmp_path / "copy")
    path = tmp_path / "copy/score-00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert (
        "score-00000.npy: its checksum" in crosstill("cache", "verify", path.parent, code=1).stderr
    )


@pytest.mark.parametrize("find", ["batch", "features", "dual"])
def test_candidates_without_a_teacher_and_their_finders(home, tmp_path, find):
    place = find if find == "batch" else home / find
    options = ["--out", tmp_path / "c", "--false", 3, "--find", place]
    said = crosstill(*build(home, "none", *options)).stdout
    assert "pairs without scores (F = 3 false captions" in said and "teacher none" in said
    found = cache.open(tmp_path / "c")
    assert found.scores is None and found.least_false("train")[0] >= 3


def test_a_seed_changes_what_is_drawn(home, tmp_path):
    for seed in (0, 1):
        crosstill(*build(home, "none", *FEW, "--out", tmp_path / str(seed), "--seed", seed))
    a, b = (np.load(tmp_path / seed / "captions.npy") for seed in "01")
    assert len(a) != len(b) or (a != b).any()


@pytest.mark.parametrize("option", [["--false", 3], ["--false-images", 3], ["--find", "batch"]])
def test_a_dual_encoder_needs_no_pairs(home, tmp_path, option):
    line = refusal(*build(home, home / "dual", "--out", tmp_path / "c", *option))
    assert f"{option[0]}: {home / 'dual'} embeds images and captions and needs no pairs" in line


@pytest.mark.parametrize("option", [["--views", 2], ["--dtype", "fp32"], ["--batch-size", 8]])
def test_a_fusion_model_has_no_features(home, tmp_path, option):
    line = refusal(*build(home, home / "fusion", "--out", tmp_path / "c", *option))
    assert f"{option[0]}: {home / 'fusion'} keeps scores of pairs and no features" in line


def test_finders_that_cannot_find(home, tmp_path):
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors/filenames.txt").write_text("000000.png\n")
    np.save(tmp_path / "vectors/image.npy", np.ones((1, 4), np.float32))
    wanted = {
        home / "fusion": "fusion: a fusion model, which reads pairs and has no embeddings",
        tmp_path / "vectors": "vectors without a model",
        home / "scores": "holds scores of pairs, and a teacher's features are needed here",
        "./nowhere": "no such folder",
    }
    for find, line in wanted.items():
        options = ["--out", tmp_path / "c", "--find", find]
        assert line in refusal(*build(home, "none", *options))
    assert not (tmp_path / "c").exists()


def test_blips_own_dual_heads_find_its_candidates(home, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "teachers"))
    from fusion_models import save

    save("blip", tmp_path / "blip")
    blip = ["cache", tmp_path / "blip", home / "photos/dataset.json", *FEW]
    crosstill(*blip, "--find", tmp_path / "blip", "--out", tmp_path / "found")
    crosstill(*blip, "--out", tmp_path / "drawn")
    found, drawn = (cache.open(tmp_path / name) for name in ("found", "drawn"))
    assert found.digest != drawn.digest
    assert found.pair_captions.tolist() != drawn.pair_captions.tolist()


def test_a_finder_of_other_data(home, tmp_path):
    crosstill("cache", home / "dual", "scenes:30:1", "--out", tmp_path / "other")
    options = ["--out", tmp_path / "c", "--find", tmp_path / "other"]
    assert "a cache of other data" in refusal(*build(home, home / "fusion", *options))


def test_other_candidates_other_data_and_numbers_that_cannot_be(home, tmp_path):
    out = ["--out", home / "scores"]
    line = refusal(*build(home, home / "fusion", *out))
    assert "another number of false captions and another number of false images" in line
    line = refusal("cache", home / "fusion", "scenes:20:1", *out, *FEW)
    assert "a score cache of another dataset" in line
    assert "another teacher" in refusal(*build(home, "none", *out, *FEW))
    line = refusal(*build(home, "none", "--out", tmp_path / "c", "--false", -4))
    assert "false = -4" in line


@pytest.mark.slow
def test_a_score_cache_killed_at_random_moments_ends_with_the_same_bytes(home, tmp_path):
    command = [sys.executable, "-m", "crosstill", "cache", home / "fusion", "scenes:300"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    began = time.monotonic()
    subprocess.run([*map(str, command), "--out", str(whole)], check=True, capture_output=True)
    seconds = time.monotonic() - began
    draw, kills = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(
            [*map(str, command), "--out", str(cut)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(draw.uniform(0.3, 1.0) * seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    subprocess.run([*map(str, command), "--out", str(cut)], check=True, capture_output=True)
    names = {path.name for path in whole.iterdir() if path.is_file() and path.name != ".lock"}
    assert kills and names == {p.name for p in cut.iterdir() if p.is_file() and p.name != ".lock"}
    for name in names:
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
