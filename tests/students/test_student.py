from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    MPNetConfig,
    MPNetModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from crosstill import files, students
from crosstill.errors import ConfigError, CorruptError, MismatchError, ModelError
from crosstill.students.student import Student
from crosstill.students.student_config import ImageTowerConfig, StudentConfig, TextTowerConfig
from crosstill.teachers.base import Teacher
from crosstill.towers import tower_parts, vocabulary

DIM = 24
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def student(pretrained: StudentConfig, captions: list[str]) -> Student:
    return students.build(pretrained, DIM, captions)


def _pixels(student: Student, count: int = 4) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (count, 3, *student.preprocess.size), dtype=torch.uint8)


@pytest.mark.parametrize("preset", ["tiny", "tiny-hf", "tiny-teacher"])
def test_presets_build_without_any_download(preset: str, captions: list[str]) -> None:
    student = students.build(preset, DIM, captions)
    images, texts = _pixels(student), student.pad(student.tokenize(captions[:4]))
    for rows in student(images, texts):
        assert rows.shape == (4, DIM)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(4))
    assert student.preprocess.size == (64, 64)


def test_the_tiny_student_is_at_most_a_quarter_of_its_teacher(captions: list[str]) -> None:
    sizes = [
        students.build(preset, 128, captions).parameters_by_part()["total"]
        for preset in ("tiny", "tiny-teacher")
    ]
    assert 4 * sizes[0] < sizes[1] < 4_000_000


def test_towers_equal_plain_transformers(
    student: Student, image_folder: Path, text_folder: Path, captions: list[str]
) -> None:
    student.eval()
    values = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        plain = AutoModel.from_pretrained(image_folder).eval()(values).pooler_output
        torch.testing.assert_close(student.pool_image(values), plain, atol=1e-5, rtol=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(text_folder)
        tower = AutoModel.from_pretrained(text_folder, num_hidden_layers=2).eval()
        hidden = [tower(**tokenizer(t, return_tensors="pt")).last_hidden_state for t in captions]
        plain = torch.cat([h.mean(dim=1) for h in hidden])
        ours = student.pool_text(*student.pad(student.tokenize(captions)))
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_the_preprocess_is_that_of_the_source(student: Student) -> None:
    assert student.preprocess.size == (40, 40)
    assert student.preprocess.interpolation == "bilinear"
    assert student.preprocess.mean == (0.5, 0.4, 0.3)


def test_equal_seeds_give_equal_weights(pretrained: StudentConfig, captions: list[str]) -> None:
    before = torch.random.get_rng_state()
    first, same, other = (
        students.build(pretrained, DIM, captions, seed).identity()["weights"] for seed in (5, 5, 6)
    )
    assert first == same != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_heads_are_xavier_normal_with_gain_root_two(captions: list[str]) -> None:
    student = students.build("tiny", 512, captions)
    for head in (student.image_head, student.text_head):
        expected = (2 * 2 / (head.in_features + head.out_features)) ** 0.5
        assert head.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert head.bias is None


def test_frozen_batch_norm_stays_as_it_came(student: Student) -> None:
    images = _pixels(student)
    with torch.no_grad():
        resting = student.eval().pool_image(images)
        training = student.train().pool_image(images)
    assert torch.equal(resting, training)
    assert student.training and student.text_tower.training


def test_batch_norm_in_training_forgets_slowly(
    pretrained: StudentConfig, captions: list[str]
) -> None:
    config = pretrained.model_copy(update={"batch_norm": "train"})
    student = students.build(config, DIM, captions)
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.momentum == 0.1 for norm in norms)
    before = norms[0].running_mean.clone()
    student.pool_image(_pixels(student))
    assert not torch.equal(before, norms[0].running_mean)


def test_batch_norm_learns_without_dropout(pretrained: StudentConfig, captions: list[str]) -> None:
    student = students.build(pretrained.model_copy(update={"batch_norm": "train"}), DIM, captions)
    student.drops = False
    student.train()
    modules = list(student.modules())
    assert student.training
    assert not any(m.training for m in modules if isinstance(m, nn.Dropout))
    assert all(m.training for m in modules if isinstance(m, nn.BatchNorm2d))
    assert not any(m.training for m in student.eval().modules())


def test_one_step_changes_every_part(student: Student, captions: list[str]) -> None:
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    texts = student.pad(student.tokenize(captions[:8]))
    rows = student(_pixels(student, 8), texts)
    (rows.image - rows.text.roll(1, 0)).square().sum().backward()
    unused = [name for name, value in student.named_parameters() if value.grad is None]
    assert not unused
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    moved = {
        n.split(".")[0] for n, v in student.named_parameters() if not torch.equal(v, before[n])
    }
    assert moved == {"image_tower", "text_tower", "image_head", "text_head"}


def test_pooled_rows_stand_in_for_a_frozen_tower(student: Student, captions: list[str]) -> None:
    student.eval()
    images, texts = _pixels(student), student.pad(student.tokenize(captions[:4]))
    with torch.no_grad():
        whole = student(images, texts)
        pooled = student(student.pool_image(images), student.pool_text(*texts))
    assert torch.equal(whole.image, pooled.image)
    assert torch.equal(whole.text, pooled.text)


def test_padding_does_not_change_a_caption(student: Student, captions: list[str]) -> None:
    student.eval()
    long = " and ".join(captions[:3])
    with torch.no_grad():
        alone = student.encode_text(student.pad(student.tokenize([captions[0]])))
        padded = student.encode_text(student.pad(student.tokenize([captions[0], long])))
    torch.testing.assert_close(alone[0], padded[0], atol=1e-6, rtol=0)


def test_long_captions_are_cut_and_counted(student: Student, captions: list[str]) -> None:
    texts = [captions[0], "a red cube " * 40]
    ids = student.tokenize(texts)
    assert len(ids[0]) < len(ids[1]) == 30
    assert ids[1][-1] == ids[0][-1]  # the closing token survives the cut
    assert student.count_truncated(texts) == 1


def test_it_keeps_the_teacher_contract(student: Student, captions: list[str]) -> None:
    assert isinstance(student, Teacher)
    assert (student.dim, student.licence) == (DIM, "apache-2.0")
    student.train()
    for rows in (student.embed_images(_pixels(student, 3)), student.embed_texts(captions[:3])):
        assert rows.shape == (3, DIM)
        assert not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(3))
    assert student.training
    assert student.embed_texts(["🎈", "", "\ud800"]).isfinite().all()
    assert student.embed_texts([]).shape == student.embed_images(_pixels(student, 0)).shape


def test_identity_follows_the_weights(student: Student) -> None:
    before = student.identity()
    with torch.no_grad():
        student.image_head.weight[0, 0] += 1e-3
    after = student.identity()
    assert {key for key in before if before[key] != after[key]} == {"weights"}


def test_parameters_by_part(student: Student) -> None:
    parts = student.parameters_by_part()
    assert parts["image tower"] + parts["text tower"] + parts["heads"] == parts["total"]
    assert parts["heads"] == DIM * (256 + 32)
    assert parts["text embeddings"] == len(student.tokenizer) * 32
    assert student.text_tower.pooler is None


def test_saving_and_loading_is_exact(student: Student, captions: list[str], tmp_path: Path) -> None:
    student.save(tmp_path / "student")
    again = students.load(tmp_path / "student")
    images, texts = _pixels(student), [*captions[:5], "elephant 🎈", "a red cube " * 40]
    assert torch.equal(again.embed_images(images), student.embed_images(images))
    assert torch.equal(again.embed_texts(texts), student.embed_texts(texts))
    assert again.identity() == student.identity()
    assert (again.name, again.licence, again.dim) == (student.name, student.licence, DIM)
    assert again.config.freezes_batch_norm
    assert not again.training
    again.save(tmp_path / "twice")
    pairs = [(p, tmp_path / "twice" / p.name) for p in (tmp_path / "student").iterdir()]
    assert all(files.digest_file(a) == files.digest_file(b) for a, b in pairs)


@pytest.mark.parametrize(
    "name", ["student.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "absent"])
def test_damage_is_named(student: Student, tmp_path: Path, name: str, damage: str) -> None:
    student.save(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    if damage == "absent":
        path.unlink()
    error = ModelError if (name, damage) == ("student.json", "absent") else CorruptError
    with pytest.raises(error, match=name.replace(".", r"\.")):
        students.load(tmp_path)


def test_widths_that_do_not_fit(pretrained: StudentConfig, captions: list[str]) -> None:
    config = pretrained.model_copy(update={"dim": 256})
    with pytest.raises(MismatchError, match="256 does not fit the teacher's 512"):
        students.build(config, 512, captions)
    assert students.build(config, None, captions).dim == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 4}, "layers = 4: the model has only 3"),
        ({"source": "/nowhere"}, "no such folder"),
        ({"source": None, "config": {"model_type": "brt"}}, "brt"),
    ],
)
def test_towers_that_cannot_be(
    pretrained: StudentConfig, captions: list[str], changes: dict, message: str
) -> None:
    text = TextTowerConfig(**{**pretrained.text.model_dump(), **changes})
    with pytest.raises((ConfigError, ModelError), match=message):
        students.build(pretrained.model_copy(update={"text": text}), DIM, captions)


def test_captions_longer_than_the_tower_reads(
    pretrained: StudentConfig, captions: list[str]
) -> None:
    longest = pretrained.model_copy(update={"max_length": 512})
    assert students.build(longest, DIM, captions).config.max_length == 512
    longer = pretrained.model_copy(update={"max_length": 513})
    with pytest.raises(ConfigError, match="max_length = 513: this BertModel has fewer positions"):
        students.build(longer, DIM, captions)


def test_photos_of_another_size_than_the_towers(tmp_path: Path, captions: list[str]) -> None:
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SMALL)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 40, "width": 40}).save_pretrained(tmp_path)
    told = {
        "image": {"source": str(tmp_path)},
        "text": {"config": {"model_type": "bert", **SMALL}},
    }
    with pytest.raises(ConfigError, match=r"photos of \(40, 40\) pixels do not fit ViTModel"):
        students.build(StudentConfig.model_validate(told), DIM, captions)


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "clip_text_model"])
def test_a_new_text_tower_knows_its_tokens(kind: str, captions: list[str]) -> None:
    told = {
        "image": {"config": {"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL}},
        "text": {"config": {"model_type": kind, **SMALL}},
    }
    student = students.build(StudentConfig.model_validate(told), DIM, captions)
    config, tokenizer = student.text_tower.config, student.tokenizer
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.eos_token_id == tokenizer.sep_token_id
    assert config.bos_token_id == tokenizer.cls_token_id


def test_a_trim_that_would_change_what_is_said(tmp_path: Path) -> None:
    """MPNet counts positions from token 1 on, wherever that is after trimming."""
    captions = ["a red cube", "a blue ball"]
    tokenizer = vocabulary.train(captions, 60)
    torch.manual_seed(0)
    config = MPNetConfig(vocab_size=len(tokenizer), initializer_range=0.2, **SMALL)
    tower = MPNetModel(config).eval()
    rows = [0, *range(2, len(tokenizer))]
    with pytest.raises(ModelError, match="would change what this mpnet says; set vocabulary"):
        tower_parts.with_rows(tower, "mean", tokenizer, rows)


def test_layers_of_a_cnn(pretrained: StudentConfig, captions: list[str]) -> None:
    image = ImageTowerConfig(source=pretrained.image.source, layers=2)
    with pytest.raises(ConfigError, match="mobilenet_v1 has no layers"):
        students.build(pretrained.model_copy(update={"image": image}), DIM, captions)


def test_towers_can_be_taken_out_of_a_dual_encoder(
    tmp_path: Path, text_folder: Path, captions: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    text = {**small, **words, "max_position_embeddings": 40, "intermediate_size": 48}
    image = {**small, "image_size": 32, "patch_size": 8, "intermediate_size": 48}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=image)).eval()
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = str(tmp_path)
    config = StudentConfig(
        image=ImageTowerConfig(source=source),
        text=TextTowerConfig(source=source, pooling="pooler", vocabulary="trim"),
    )
    student = students.build(config, DIM, captions).eval()
    values = torch.randn(2, 3, 32, 32)
    tokens = student.pad(student.tokenize(captions[:5]))
    ids = tokenizer(captions[:5], return_tensors="pt", padding=True)
    ids.pop("token_type_ids", None)
    with torch.no_grad():
        plain = clip.vision_model(values).pooler_output
        torch.testing.assert_close(student.pool_image(values), plain, atol=1e-5, rtol=1e-5)
        plain = clip.text_model(**ids).pooler_output
        torch.testing.assert_close(student.pool_text(*tokens), plain, atol=1e-5, rtol=1e-5)


def test_the_real_towers_fit_their_budget(shared: Path) -> None:
    record = files.read_json(shared / "flickr8k" / "dataset_flickr8k.json")
    train = [image for image in record["images"] if image["split"] == "train"]
    captions = [sentence["raw"] for image in train for sentence in image["sentences"]]
    config = StudentConfig(
        image=ImageTowerConfig(source=str(shared / "models" / "mobilenet_v1_0.5_160")),
        text=TextTowerConfig(source=str(shared / "models" / "minilm-l3"), vocabulary="trim"),
    )
    student = students.build(config, 512, captions)
    assert student.parameters_by_part()["total"] <= 10_300_000
    assert student.preprocess.size == (160, 160)
    assert student.count_truncated(captions) < 0.01 * len(captions)


def test_captions_of_similar_length_share_a_pass_and_keep_their_rows(
    student: Student, captions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student.eval()
    texts = [" ".join(captions)[: 7 * n] for n in (9, 1, 5, 2, 8, 1, 3)]
    tokens = student.pad(student.tokenize(texts))
    monkeypatch.setattr("crosstill.students.student.CHUNK_WITH_DROPOUT", 3)
    seen: list[int] = []
    student.text_tower.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    found = student(_pixels(student, 7), tokens).text
    lengths = tokens.attention_mask.sum(1).sort().values
    assert seen == [int(part.max()) for part in lengths.split(3)]
    torch.testing.assert_close(found, student.encode_text(tokens), rtol=0, atol=1e-6)


def test_rows_before_their_normalisation(student: Student, captions: list[str]) -> None:
    student.eval()
    tokens = student.pad(student.tokenize(captions[:3]))
    unit, plain = (student(_pixels(student, 3), tokens, normalise) for normalise in (True, False))
    for a, b in zip(unit, plain, strict=True):
        torch.testing.assert_close(torch.nn.functional.normalize(b, dim=1), a)
        assert (b.norm(dim=1) - 1).abs().min() > 1e-3


def test_a_towers_digest_is_of_what_it_gives(student: Student) -> None:
    image, text = student.tower_digest("image"), student.tower_digest("text")
    with torch.no_grad():
        student.image_head.weight.add_(1)
        assert student.tower_digest("image") == image
        next(student.image_tower.parameters()).add_(1)
    assert student.tower_digest("image") != image
    assert student.tower_digest("text") == text
