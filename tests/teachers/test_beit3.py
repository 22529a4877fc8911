"""BEiT-3: its forward pass, its released names, and its life as a teacher and a folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crosstill import teachers
from crosstill.errors import ConfigError, CorruptError, ModelError
from crosstill.images import Preprocess
from crosstill.teachers import beit3_released
from crosstill.teachers.base import Teacher
from crosstill.teachers.beit3 import SIZES, Beit3, Network, Shape
from crosstill.towers.tower_parts import resized_positions
from teachers.beit3_files import (
    BASE,
    BASE_384,
    GIANT,
    LARGE_384,
    on_meta,
    rows,
    small,
    write_pieces,
)
from teachers.slow_beit3 import SlowBeit3

TEXTS = ["a red cube", "a blue ball and a big red cube", "x", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return small()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    return write_pieces(tmp_path_factory.mktemp("pieces") / "beit3.spm")


@pytest.fixture(scope="module")
def model(state, pieces) -> Beit3:
    return beit3_released.load(state, pieces, "small")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=random)


def distances(rows: Tensor) -> Tensor:
    return torch.pdist(rows)


# --- the forward pass ---


def test_images_equal_the_slow_reference(model, state, pixels):
    slow = torch.stack([SlowBeit3(state, 2).image(image) for image in pixels])
    assert distances(slow).min() > 0.1  # rows that say something
    torch.testing.assert_close(model.embed_images(pixels).double(), slow, atol=1e-5, rtol=0)


def test_texts_equal_it_with_and_without_padding(model, state):
    ids, mask = model.tokenizer(TEXTS)
    assert mask.sum(1).unique().numel() == len(TEXTS)  # lengths differ: three are padded
    reference = SlowBeit3(state, 2)
    slow = torch.stack(
        [reference.text(*row) for row in zip(ids.tolist(), (1 - mask).tolist(), strict=True)]
    )
    assert distances(slow).min() > 0.1
    torch.testing.assert_close(model.embed_texts(TEXTS).double(), slow, atol=1e-5, rtol=0)
    bare = [row[: int(length)] for row, length in zip(ids.tolist(), mask.sum(1), strict=True)]
    unpadded = torch.stack([reference.text(row, [0] * len(row)) for row in bare])
    torch.testing.assert_close(unpadded, slow, atol=1e-12, rtol=0)


def test_heads_of_another_width_equal_it_in_float64():
    """The giant's heads are 88 wide, and its patches 14 pixels."""
    shape = Shape(36, layers=3, heads=3, mlp=50, patch=14, image_size=42, words=40, places=12)
    torch.manual_seed(0)
    network = Network(shape).double()
    for value in network.parameters():
        nn.init.normal_(value, std=0.3)
    image = torch.randint(0, 256, (3, 42, 42), dtype=torch.uint8)
    ids, mask = torch.tensor([[0, 7, 9, 30, 2, 1, 1, 1]]), torch.tensor([[1] * 5 + [0] * 3])
    with torch.inference_mode():
        found = [
            network.embed_image((image.double() / 255 - 0.5)[None] / 0.5)[0],
            network.embed_text(ids, mask)[0],
        ]
    slow = SlowBeit3(network.state_dict(), 3)
    wanted = [slow.image(image), slow.text(ids[0].tolist(), (1 - mask[0]).tolist())]
    for row, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(row / row.norm(), expected, atol=1e-9, rtol=0)


def test_images_see_only_their_own_weights_and_texts_only_theirs(state, pieces, pixels, model):
    for way, head in (("A", "vision_head"), ("B", "language_head")):
        other = {
            name: value + 0.3 if f".{way}." in name or name.startswith(head) else value
            for name, value in state.items()
        }
        changed = beit3_released.load(other, pieces, "changed")
        same_images = torch.equal(changed.embed_images(pixels), model.embed_images(pixels))
        same_texts = torch.equal(changed.embed_texts(TEXTS), model.embed_texts(TEXTS))
        assert (same_images, same_texts) == (way == "B", way == "A")


# --- names and sizes ---


@pytest.mark.parametrize(
    ("table", "size", "image_size", "count"),
    [
        (BASE, "base", 224, 222_167_041),
        (BASE_384, "base", 384, 222_458_881),
        (LARGE_384, "large", 384, 675_188_737),
        (GIANT, "giant", 224, 2_117_957_633),
    ],
)
def test_names_shapes_and_order_are_those_of_the_tables(table, size, image_size, count):
    network, found = beit3_released.examine(on_meta(table))
    assert found.whole and not found.leftovers
    listed = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    assert listed == rows(table)
    known = SIZES[size].to_json() | {"image_size": image_size}
    assert network.shape.to_json() == known
    parts = network.parameters_by_part()
    assert parts["total"] == count == parts["image"] + parts["text"] + 1  # and logit_scale


@pytest.mark.parametrize(
    ("size", "image_size", "published"), [("base", 224, 222e6), ("large", 224, 674e6)]
)
def test_parameter_counts_are_the_published_ones(size, image_size, published):
    assert SIZES[size].image_size == image_size
    with torch.device("meta"):
        count = Network(SIZES[size]).parameters_by_part()["total"]
    assert abs(count / published - 1) < 0.01


def test_leftovers_of_pretraining_are_known(state, pieces, model, pixels):
    more = {"mim_head.weight": torch.ones(9, 128), "mim_head.bias": torch.ones(9)}
    network, found = beit3_released.examine(state | more)
    assert found.whole and network.shape.layers == 2
    assert found.leftovers == {"the masked-image head of pretraining": sorted(more)}
    loaded = beit3_released.load(state | more, pieces, "more")
    assert torch.equal(loaded.embed_images(pixels), model.embed_images(pixels))


DECIDING = [
    "logit_scale",
    "beit3.text_embed.weight",
    "beit3.vision_embed.cls_token",
    "beit3.vision_embed.proj.weight",
    "beit3.encoder.embed_positions.A.weight",
    "beit3.encoder.embed_positions.B.weight",
    "beit3.encoder.layers.0.self_attn_layer_norm.A.weight",
    "beit3.encoder.layers.1.ffn.B.fc1.bias",
    "beit3.encoder.layers.11.self_attn.inner_attn_ln.B.weight",
    "beit3.encoder.layer_norm.A.weight",
]


@pytest.mark.parametrize("name", DECIDING)
def test_a_missing_and_a_renamed_key_are_named(name):
    full = on_meta(BASE)
    value = full.pop(name)
    assert list(beit3_released.examine(full)[1].missing) == [name]
    full[f"{name}s"] = value
    found = beit3_released.examine(full)[1]
    assert (list(found.missing), list(found.unexpected)) == ([name], [f"{name}s"])


@pytest.mark.parametrize("name", ["vision_head.weight", *DECIDING[2:4], *DECIDING[6:]])
def test_a_key_of_another_shape_is_named(name):
    full = on_meta(BASE)
    right = tuple(full[name].shape)
    full[name] = torch.empty((*right[:-1], right[-1] + 1), device="meta")
    found = beit3_released.examine(full)[1]
    assert name in found.misshapen and not found.whole
    assert not found.missing and not found.unexpected


def test_a_position_table_of_no_square_is_named():
    full = on_meta(BASE)
    name = "beit3.encoder.embed_positions.A.weight"
    full[name] = torch.empty(200, 768, device="meta")
    assert beit3_released.examine(full)[1].misshapen == {name: ((200, 768), (199, 768))}


@pytest.mark.parametrize("lost", [["vision_head.weight"], ["language_head.weight"], None])
def test_a_file_without_retrieval_heads_is_refused_by_name(state, lost):
    lost = lost or ["language_head.weight", "vision_head.weight"]
    less = {name: value for name, value in state.items() if name not in lost}
    with pytest.raises(ModelError) as refusal:
        beit3_released.examine(less)
    assert str(refusal.value) == (
        f"no {' and no '.join(lost)}, so it has no joint space: a file of pretraining or of "
        "another task; take a retrieval or an itc file"
    )


def test_what_is_not_whole_does_not_load(state, pieces):
    damaged = dict(state)
    damaged["beit3.fusion"] = damaged.pop("beit3.encoder.layer_norm.B.bias")
    damaged["vision_head.weight"] = torch.zeros(2, 2)
    with pytest.raises(ModelError) as refusal:
        beit3_released.load(damaged, pieces, "it.pth")
    assert str(refusal.value) == (
        "it.pth: 1 missing (beit3.encoder.layer_norm.B.bias), 1 unexpected (beit3.fusion), "
        "1 of another shape (vision_head.weight); list them with `crosstill inspect`"
    )


def test_names_of_another_model_and_sizes_of_none_are_refused(state):
    with pytest.raises(ModelError, match="not a BEiT-3 checkpoint"):
        beit3_released.examine({"classifier.weight": torch.ones(2)})
    wide = {n: torch.empty([100 if s == 128 else s for s in v.shape]) for n, v in state.items()}
    with pytest.raises(ModelError, match="make no BEiT-3 .width 100 is not a multiple of 64"):
        beit3_released.examine(wide)
    for name, short in (("A", "image_size = 0 is not"), ("B", "places = 2 leaves no room")):
        name = f"beit3.encoder.embed_positions.{name}.weight"
        with pytest.raises(ModelError, match=short):
            beit3_released.examine(state | {name: torch.empty(2, 128)})


# --- as a teacher ---


def test_it_keeps_the_teacher_contract(model, pixels):
    assert isinstance(model, Teacher)
    assert model.modalities == {"image", "text"} and (model.name, model.dim) == ("small", 128)
    assert model.preprocess == Preprocess(size=(32, 32))  # squashed, bicubic, mean = std = 0.5
    for found in (model.embed_images(pixels), model.embed_texts(["a", "b", ""])):
        assert found.shape == (3, 128) and found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert model.embed_images(pixels[:0]).shape == model.embed_texts([]).shape == (0, 128)
    assert model.parameter_count() == sum(value.numel() for value in small().values())
    assert set(model.identity()) == {"weights", "preprocess", "tokenizer", "activation", "family"}
    assert model.source is None and model.licence is None
    assert not any(value.requires_grad for value in model.network.parameters())


def test_rows_do_not_depend_on_their_company(model, pixels):
    texts = [f"a {'red ' * (i % 7)}cube" for i in range(100)]
    alone = torch.cat([model.embed_texts([text]) for text in texts[:7]])
    torch.testing.assert_close(model.embed_texts(texts)[:7], alone, atol=2e-6, rtol=0)
    one = model.embed_images(pixels[1:2])
    torch.testing.assert_close(model.embed_images(pixels)[1:2], one, atol=2e-6, rtol=0)


def test_odd_texts_embed(model):
    odd = ["\ud800", "\x00", "\n", "漢字" * 99, "</s><pad>", "a" * 10_000]
    assert model.embed_texts(odd).isfinite().all()


def test_half_precision_is_cast_and_the_file_is_left_as_it_was(state, pieces, pixels):
    for kind in (torch.float16, torch.bfloat16):
        halves = {name: value.to(kind) for name, value in state.items()}
        loaded = beit3_released.load(halves, pieces, "half")
        assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
        singles = {name: value.float() for name, value in halves.items()}
        expected = beit3_released.load(singles, pieces, "single")
        assert torch.equal(loaded.embed_images(pixels), expected.embed_images(pixels))
        assert all(value.dtype == kind for value in halves.values())
        name = "vision_head.weight"
        assert loaded.network.vision_head.weight.data_ptr() != halves[name].data_ptr()
        assert expected.network.vision_head.weight.data_ptr() != singles[name].data_ptr()


def test_nan_weights_are_not_taken_for_a_teacher(state, pieces, pixels):
    bad = state | {"vision_head.weight": torch.full((128, 128), torch.nan)}
    with pytest.raises(ModelError, match="small: 3 of 3 embeddings are NaN"):
        beit3_released.load(bad, pieces, "small").embed_images(pixels)


def test_another_resolution(state, pieces, pixels):
    larger = beit3_released.load(state, pieces, "larger", image_size=48)
    assert larger.preprocess.size == (48, 48)
    old = state["beit3.encoder.embed_positions.A.weight"]
    new = larger.network.beit3.encoder.embed_positions["A"].weight
    assert new.shape == (39, 128) and torch.equal(new[:3], old[:3])
    assert torch.equal(new[2:], resized_positions(old[2:], 6))
    image = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    assert larger.embed_images(image).shape == (1, 128)
    with pytest.raises(ConfigError, match="image_size = 50 is not a multiple of patches of 8"):
        beit3_released.load(state, pieces, "larger", image_size=50)


def test_the_model_counts_its_truncated_texts(model):
    assert model.max_length == 18  # its position table has 20 rows, and two are never read
    assert model.count_truncated(["a red cube " * 40, "a red cube", ""]) == 1
    long = model.embed_texts(["a red cube " * 40, "a red cube " * 50])
    torch.testing.assert_close(long[0], long[1], atol=1e-6, rtol=0)


# --- as a folder ---


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save(tmp_path / "folder")
    return tmp_path / "folder"


def test_a_folder_gives_the_same_rows_wherever_it_lies(model, folder, pixels):
    moved = folder.rename(folder.with_name("moved"))
    assert sorted(path.name for path in moved.iterdir()) == [
        "beit3.json",
        "beit3.spm",
        "model.safetensors",
    ]
    again = teachers.load(moved, CPU)
    assert isinstance(again, Beit3) and again.name == "small" and again.source == str(moved)
    assert torch.equal(again.embed_images(pixels), model.embed_images(pixels))
    assert torch.equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    assert again.identity() == model.identity() and again.licence is None
    (moved / "README.md").write_text("---\nlicense: mit\n---\n")
    assert teachers.load(moved, CPU).licence == "mit"
    assert teachers.load(moved, CPU).identity() == model.identity()


def test_identity_follows_weights_and_tokenizer(model, state, pieces, tmp_path):
    before = model.identity()
    nudged = state | {"logit_scale": state["logit_scale"] + 1e-3}
    after = beit3_released.load(nudged, pieces, "x").identity()
    assert {key for key in before if before[key] != after[key]} == {"weights"}
    other = beit3_released.load(
        state, write_pieces(tmp_path / "other.spm", ["a cone"] * 9), "x"
    ).identity()
    assert {key for key in before if before[key] != other[key]} == {"tokenizer"}


@pytest.mark.parametrize("name", ["beit3.json", "model.safetensors", "beit3.spm"])
def test_damage_is_seen_and_named(folder, name):
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(CorruptError, match=name):
        teachers.load(folder, CPU)
    path.unlink()
    if name != "beit3.json":
        with pytest.raises(CorruptError, match=f"{name}: the file is missing"):
            teachers.load(folder, CPU)


def test_a_single_file_says_how_it_becomes_a_folder(state, tmp_path):
    for name, leave in (("it.pth", "--unpickle "), ("it.safetensors", "")):
        path = tmp_path / name
        save_file(state, path) if name.endswith("tensors") else torch.save({"model": state}, path)
        with pytest.raises(ModelError) as refusal:
            teachers.load(path)
        text = str(refusal.value)
        assert f"`crosstill inspect {path} {leave}--out FOLDER --tokenizer PATH`" in text
        assert "\n" not in text and text.startswith(f"{path}: a single file")
    assert len(load_file(tmp_path / "it.safetensors")) == len(state)
