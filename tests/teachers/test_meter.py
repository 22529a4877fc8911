"""METER: its forward pass, its released names, and its life as a folder."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from crosstill import teachers
from crosstill.errors import ConfigError, ModelError
from crosstill.fusion import meter_released
from crosstill.fusion.meter import ClipVisual, Meter
from crosstill.towers.tower_parts import resized_positions
from crosstill.types import States
from support import matrix
from teachers.released_files import PRETRAIN, RETRIEVAL, STUDENT, on_meta, small, write_tokenizer
from teachers.slow_meter import MEAN, STD, SlowMeter

TEXTS = ["a red cube", "a blue ball and a big red cube", "x"]
WORDS_OF_CLIP = "vit_model.token_embedding.weight"
POSITION_IDS = "text_transformer.embeddings.position_ids"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A retrieval file with DCD's student in it; both towers have two layers."""
    return small(RETRIEVAL, STUDENT, layers=2)


@pytest.fixture(scope="module")
def meter(state, tokenizer) -> Meter:
    return meter_released.load(state, tokenizer, "small")


@pytest.fixture(scope="module")
def pixels() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=random) for _ in range(3)
    ]


def slow_scores(slow: SlowMeter, pixels: list[Tensor], tokens: States) -> Tensor:
    rows = zip(pixels, tokens.hidden.tolist(), tokens.mask.tolist(), strict=True)
    return torch.tensor([slow.score(*row) for row in rows], dtype=torch.float64)


@pytest.fixture(scope="module")
def slow(state, meter, pixels) -> Tensor:
    return slow_scores(SlowMeter(state, list(range(6))), pixels, meter.tokenize(TEXTS))


# --- the forward pass ---


def test_the_forward_equals_the_slow_reference(meter, pixels, slow):
    assert meter.tokenize(TEXTS).mask.sum(1).unique().numel() == 3  # lengths differ: two are padded
    assert slow.std() > 0.1  # scores that say something
    found = meter.score(pixels, TEXTS)
    torch.testing.assert_close(found.double(), slow, atol=1e-5, rtol=0)


def in_double(model: Meter, pixels: list[Tensor], tokens: States) -> Tensor:
    mean, std = (torch.tensor(c, dtype=torch.float64).view(3, 1, 1) for c in (MEAN, STD))
    values = (torch.stack(pixels).double() / 255 - mean) / std
    with torch.inference_mode():
        image = model.image_tower(values)
        text = model.text_tower(input_ids=tokens.hidden, attention_mask=tokens.mask)
        images = States(image, image.new_ones(image.shape[:2]))
        texts = States(text.last_hidden_state, tokens.mask.double())
        return model.score_states(model.project(images, "image"), model.project(texts, "text"))


def test_in_float64_the_forward_equals_it_to_nine_digits(state, tokenizer, pixels, slow):
    model = meter_released.load(state, tokenizer, "double").double()
    found = in_double(model, pixels, model.tokenize(TEXTS))
    torch.testing.assert_close(found, slow, atol=1e-9, rtol=0)


def test_the_cut_stack_equals_it_too(state, meter, pixels, slow):
    cut = meter.cut([0, 3, 5])
    expected = slow_scores(SlowMeter(state, [0, 3, 5]), pixels, meter.tokenize(TEXTS))
    torch.testing.assert_close(cut.score(pixels, TEXTS).double(), expected, atol=1e-5, rtol=0)
    assert (expected - slow).abs().min() > 1e-3
    assert cut.depth == 3 and meter.depth == 6
    assert torch.equal(meter.cut().score(pixels, TEXTS), cut.score(pixels, TEXTS))


def test_the_student_of_dcd_equals_it(state, tokenizer, pixels, meter):
    student = meter_released.load(state, tokenizer, "student", student=True)
    expected = slow_scores(SlowMeter(state, [0, 1, 2], "stu_"), pixels, meter.tokenize(TEXTS))
    assert student.depth == 3
    torch.testing.assert_close(student.score(pixels, TEXTS).double(), expected, atol=1e-5, rtol=0)


def test_a_student_that_starts_as_dcd_starts_it_is_the_cut_teacher(state, tokenizer, pixels, meter):
    copied = dict(state)
    for name in state:
        if name.startswith("stu_"):
            deep = name.removeprefix("stu_")
            for new, old in enumerate([0, 3, 5]):
                deep = deep.replace(f"_layers.{new}.", f"_layers.*{old}.")
            copied[name] = state[deep.replace("*", "")]
    student = meter_released.load(copied, tokenizer, "student", student=True)
    assert torch.equal(student.score(pixels, TEXTS), meter.cut([0, 3, 5]).score(pixels, TEXTS))


def test_padding_changes_no_score(meter, pixels, slow):
    """Not even padding with id 0, as METER pads its sampled negatives."""
    tokens = meter.tokenize(TEXTS)
    for filler in (0, 1):
        ids = torch.full((3, 40), filler)
        mask = torch.zeros(3, 40, dtype=torch.int64)
        ids[:, : tokens.hidden.shape[1]] = torch.where(tokens.mask == 1, tokens.hidden, filler)
        mask[:, : tokens.mask.shape[1]] = tokens.mask
        with torch.inference_mode():
            texts = meter.project(meter.encode_texts(States(ids, mask)), "text")
            images = meter.image_states(pixels)
            found = meter.score_states(images, texts).double()  # padding and all
        torch.testing.assert_close(found, slow, atol=1e-5, rtol=0)


def test_texts_are_cut_at_forty_tokens(meter, pixels):
    long = "a red cube " * 40
    assert meter.max_length == 40
    assert meter.text_states([long, "x"]).mask.sum(1).tolist() == [40, 3]
    assert meter.count_truncated([long, "x", "a red cube"]) == 1
    same = meter.score(pixels[:1] * 2, [long, long + "and a blue ball"])
    torch.testing.assert_close(same[0], same[1], atol=1e-6, rtol=0)


def test_images_are_cropped_and_normalised_as_clip_does(meter):
    rules = meter.preprocess
    assert rules.size == (32, 32) and rules.resize == "crop" and rules.interpolation == "bicubic"
    assert rules.sides(64, 48) == (42, 32)  # the shorter side to 32
    assert rules.mean == MEAN and rules.std == STD


# --- the image tower ---


def test_the_tower_is_rebuilt_from_its_config():
    tower = ClipVisual(image_size=24, patch_size=8, width=64, layers=1, heads=2, mlp=48)
    again = ClipVisual(**tower.config)
    again.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, 24, 24)
    assert tower(pixels).shape == (2, 10, 64)
    assert torch.equal(tower(pixels), again(pixels))
    with pytest.raises(ConfigError, match="image_size = 20 is not a multiple of patches of 8"):
        ClipVisual(image_size=20, patch_size=8)


def taps(place: float, size: int) -> list[float]:
    """How much each of `size` points in a row counts at a place (Keys' cubic, a = -0.75)."""
    weights = [0.0] * size
    floor = math.floor(place)
    for point in range(floor - 1, floor + 3):
        x = abs(place - point)
        inner = 1.25 * x**3 - 2.25 * x**2 + 1
        outer = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        weights[min(max(point, 0), size - 1)] += inner if x <= 1 else outer
    return weights


def test_positions_are_resized_bicubically_and_the_class_tokens_stays():
    table = torch.randn(10, 5, dtype=torch.float64)
    found = resized_positions(table, 5)
    assert found.shape == (26, 5) and torch.equal(found[0], table[0])
    rows = [taps((i + 0.5) * 3 / 5 - 0.5, 3) for i in range(5)]  # align_corners=False
    for top in range(5):
        for left in range(5):
            expected = sum(
                rows[top][y] * rows[left][x] * table[1 + 3 * y + x]
                for y in range(3)
                for x in range(3)
            )
            torch.testing.assert_close(found[1 + 5 * top + left], expected)
    assert torch.equal(resized_positions(table, 3), table)


def test_a_checkpoint_for_another_resolution(tokenizer, state):
    model = meter_released.load(state, tokenizer, "larger", image_size=48)
    assert model.preprocess.size == (48, 48)
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    assert model.image_states([image]).hidden.shape == (1, 37, 128)
    with pytest.raises(ConfigError, match="image_size = 50 is not a multiple of patches of 8"):
        meter_released.load(state, tokenizer, "larger", image_size=50)


# --- released names ---


RELEASED = [
    (table, absent)
    for table in (RETRIEVAL, PRETRAIN)
    for absent in ((), (WORDS_OF_CLIP,), (POSITION_IDS,), (WORDS_OF_CLIP, POSITION_IDS))
]


@pytest.mark.parametrize(("table", "absent"), matrix(RELEASED, [RELEASED[3], RELEASED[4]]))
def test_the_released_files_load_whole(table, absent, tokenizer):
    full = {k: v for k, v in on_meta(table).items() if k not in absent}
    _, found = meter_released.examine(full)
    assert found.missing == found.unexpected == found.misshapen == {} and found.whole
    if absent:
        return
    model = meter_released.load(full, tokenizer, "full")
    size = 384 if table == RETRIEVAL else 288
    assert model.preprocess.size == (size, size) and model.max_length == 40
    read = set(full) - {name for names in found.leftovers.values() for name in names}
    head = 0 if table == RETRIEVAL else 1537  # taken from the matching head
    assert model.parameter_count() == sum(full[name].numel() for name in read) + head


@pytest.mark.parametrize("student", [False, True])
def test_the_files_of_dcd_load_whole_either_way(student, tokenizer):
    full = on_meta(RETRIEVAL, STUDENT)
    model, found = meter_released.examine(full, student)
    assert found.whole and model.depth == (3 if student else 6)
    other = (
        "the stack of the student's teacher" if student else "DCD's student, read with --student"
    )
    assert len(found.leftovers[other]) == (318 if student else 162)
    if student:  # a file without the teacher's stack will do
        alone = {name: v for name, v in full.items() if not name.startswith("cross_modal_image_l")}
        assert meter_released.examine(alone, student)[1].whole
    loaded = meter_released.load(full, tokenizer, "full", student)
    assert loaded.parameters_by_part()["fusion"] == (59_076_097 if student else 115_786_753)


def test_every_leftover_has_a_reason():
    _, found = meter_released.examine(on_meta(RETRIEVAL))
    assert sorted(name for names in found.leftovers.values() for name in names) == [
        "itm_score.fc.bias",
        "itm_score.fc.weight",
        "text_transformer.embeddings.position_ids",
        "text_transformer.pooler.dense.bias",
        "text_transformer.pooler.dense.weight",
        "vit_model.ln_final.bias",
        "vit_model.ln_final.weight",
        "vit_model.positional_embedding",
        "vit_model.token_embedding.weight",
    ]


DECIDING = [
    "vit_model.visual.conv1.weight",
    "vit_model.visual.positional_embedding",
    "vit_model.visual.transformer.resblocks.0.ln_1.weight",
    "vit_model.visual.transformer.resblocks.1.mlp.c_fc.bias",
    "text_transformer.embeddings.word_embeddings.weight",
    "text_transformer.embeddings.position_embeddings.weight",
    "text_transformer.encoder.layer.0.output.LayerNorm.weight",
    "cross_modal_image_layers.2.crossattention.self.key.weight",
    "cross_modal_text_layers.5.output.LayerNorm.weight",
    "cross_modal_text_transform.weight",
    "token_type_embeddings.weight",
    "cross_modal_image_pooler.dense.bias",
    "rank_output.weight",
]
# one of each tower, and one of the fusion layers
CHIEF = [DECIDING[0], DECIDING[4], DECIDING[7]]


@pytest.mark.parametrize("name", matrix(DECIDING, CHIEF))
def test_a_missing_and_a_renamed_key_are_named(name):
    full = on_meta(RETRIEVAL, layers=2)
    value = full.pop(name)
    assert list(meter_released.examine(full)[1].missing) == [name]
    full[f"{name}s"] = value
    found = meter_released.examine(full)[1]
    assert (list(found.missing), list(found.unexpected)) == ([name], [f"{name}s"])
    assert found.missing[name] == found.unexpected[f"{name}s"] == tuple(value.shape)


def test_what_is_not_whole_does_not_load(state, tokenizer):
    damaged = {**state, "rank_output.bias": torch.zeros(2)}
    damaged["rank_head.weight"] = damaged.pop("rank_output.weight")
    with pytest.raises(ModelError) as refusal:
        meter_released.load(damaged, tokenizer, "meter.ckpt")
    assert str(refusal.value) == (
        "meter.ckpt: 1 missing (rank_output.weight), 1 unexpected (rank_head.weight), "
        "1 of another shape (rank_output.bias); list them with `crosstill inspect`"
    )


SIZED = [name for name in DECIDING if "embeddings.w" not in name]


@pytest.mark.parametrize("name", matrix(SIZED, CHIEF))
def test_a_key_of_another_shape_is_named(name):
    full = on_meta(RETRIEVAL, layers=2)
    right = tuple(full[name].shape)
    wrong = (*right[:-1], right[-1] + 1)
    full[name] = torch.empty(wrong, device="meta")
    found = meter_released.examine(full)[1]
    if name.endswith("conv1.weight"):  # patches of 17 pixels: not square
        assert found.misshapen[name] == (wrong, (768, 3, 17, 17))
    else:
        assert found.misshapen == {name: (wrong, right)}
    assert not found.whole and not found.missing and not found.unexpected


def test_names_of_another_model_and_sizes_of_none_are_refused(tokenizer):
    with pytest.raises(ModelError, match="no tensor named cross_modal_image_layers"):
        meter_released.examine({"classifier.weight": torch.ones(2)})
    with pytest.raises(ModelError, match="not a checkpoint with DCD's student"):
        meter_released.examine(on_meta(RETRIEVAL), student=True)
    full = on_meta(RETRIEVAL, layers=1)
    odd = {name: value for name, value in full.items() if "LayerNorm" not in name}
    odd["cross_modal_text_layers.0.output.LayerNorm.weight"] = torch.empty(100, device="meta")
    with pytest.raises(ModelError, match="width 100 is not a multiple of 64"):
        meter_released.examine(odd)
    empty = {name: torch.empty(0, 0, 0, 0, device="meta") for name in full}
    found = meter_released.examine(empty)[1]
    assert len(found.misshapen) == len(full) - 9 and not found.missing and not found.unexpected


# --- from a file to a folder ---


def test_a_converted_folder_gives_the_same_scores(meter, pixels, tmp_path):
    meter.save(tmp_path / "folder")
    again = teachers.load(tmp_path / "folder", torch.device("cpu"))
    assert isinstance(again, Meter) and again.towers_frozen
    assert torch.equal(again.score(pixels, TEXTS), meter.score(pixels, TEXTS))
    assert again.identity() == meter.identity()
    assert (again.max_length, again.preprocess) == (meter.max_length, meter.preprocess)
    cut = meter.cut()
    cut.save(tmp_path / "cut")
    half = teachers.load(tmp_path / "cut", torch.device("cpu"))
    assert torch.equal(half.score(pixels, TEXTS), cut.score(pixels, TEXTS))


def test_a_pretraining_file_is_scored_by_row_one_of_its_matching_head(tokenizer, pixels):
    state = small(PRETRAIN, layers=1)
    model = meter_released.load(state, tokenizer, "pretrained")
    head = nn.functional.linear(torch.eye(256), state["itm_score.fc.weight"])[:, 1]
    assert torch.equal(model.fusion.rank_output.weight[0], head)
    assert model.fusion.rank_output.bias == state["itm_score.fc.bias"][1]
    assert model.image_states([image[:, :16, :16] for image in pixels]).hidden.shape[1] == 5


def test_half_precision_is_cast_and_the_file_is_left_as_it_was(state, tokenizer, pixels):
    halves = {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }
    before = {name: value.clone() for name, value in halves.items()}
    model = meter_released.load(halves, tokenizer, "half")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    singles = meter_released.load({k: v.float() for k, v in before.items()}, tokenizer, "single")
    assert torch.equal(model.score(pixels, TEXTS), singles.score(pixels, TEXTS))
    assert all(torch.equal(before[name], value) for name, value in halves.items())


def test_another_models_tokenizer_is_refused(state, tokenizer, pair_folder):
    with pytest.raises(ModelError, match="padding 0, where the checkpoint has 300 with padding 1"):
        meter_released.load(state, pair_folder, "it")
    few = dict(state)
    name = "text_transformer.embeddings.word_embeddings.weight"
    few[name] = few[name][:100]
    with pytest.raises(ModelError, match="276 tokens with padding 1, where the checkpoint has 100"):
        meter_released.load(few, tokenizer, "it")
