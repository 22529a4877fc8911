import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from crosstill import images, teachers
from crosstill.errors import ModelError


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


def test_a_single_tower_is_no_dual_encoder(pair_folder: Path) -> None:
    config = BertConfig(vocab_size=150, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(pair_folder)
    with pytest.raises(ModelError, match="BertModel is no dual encoder"):
        teachers.load(pair_folder)


def test_towers_without_a_joint_space(pair_folder: Path) -> None:
    weights = load_file(pair_folder / "model.safetensors")
    weights["text_projection.weight"] = weights["text_projection.weight"][:20].clone()
    save_file(weights, pair_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="does not load") as caught:
        teachers.load(pair_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist(source: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        teachers.load(source)


def test_a_hub_id_offline_is_one_line_and_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda line, address: asked.append(address))
    with pytest.raises(ModelError, match="hub cannot be reached") as caught:
        teachers.load("someone/some-model-that-is-nowhere")
    assert not asked
    assert caught.value.__suppress_context__


def test_the_shared_teacher_loads(shared: Path) -> None:
    teacher = teachers.load(shared / "models" / "teacher-flickr8k")
    assert (teacher.dim, teacher.name) == (512, "teacher-flickr8k")
    assert teacher.preprocess == images.Preprocess(size=(224, 224))
    assert teacher.identity()["activation"] == "relu6/gelu"
    near = teacher.embed_texts(["A dog runs.", "A dog is running.", "Two men play chess."])
    assert near[0] @ near[1] > 0.8 > near[0] @ near[2]
