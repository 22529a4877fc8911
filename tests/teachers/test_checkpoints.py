"""Reading tensors from whatever holds them, and running nothing."""

import os
import pickle
import sys
import types
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crosstill.errors import CorruptError, ModelError
from crosstill.teachers import checkpoints

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)


def one_line(path: Path, unpickle: bool = True) -> str:
    with pytest.raises(ModelError) as refusal:
        checkpoints.read(path, unpickle)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 400
    return text


def test_safetensors_need_no_leave(tmp_path):
    save_file(STATE, tmp_path / "one.safetensors")
    assert same(checkpoints.read(tmp_path / "one.safetensors"))
    assert same(checkpoints.read(tmp_path))


def test_the_shards_of_a_folder_are_one_checkpoint(tmp_path):
    for name, value in STATE.items():
        save_file({name: value}, tmp_path / f"model-{name}.safetensors")
    assert same(checkpoints.read(tmp_path))


@pytest.mark.parametrize("end", [".ckpt", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("holder", [None, "state_dict", "model", "module"])
def test_pickled_files_by_their_holders(tmp_path, holder, end):
    content = OrderedDict(STATE) if holder is None else {"epoch": 3, holder: OrderedDict(STATE)}
    torch.save(content, tmp_path / f"it{end}")
    assert same(checkpoints.read(tmp_path / f"it{end}", unpickle=True))
    assert same(checkpoints.read(tmp_path, unpickle=True))


def test_a_pickled_file_without_leave_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "it.ckpt")
    for place in (tmp_path / "it.ckpt", tmp_path):
        with pytest.raises(ModelError, match=r"it\.ckpt: a pickled file.*--unpickle"):
            checkpoints.read(place)


def test_the_form_of_torch_before_1_6(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(checkpoints.read(tmp_path / "old.pth", unpickle=True))


@pytest.fixture
def lightning(monkeypatch):
    """The classes that a Lightning 1.3 file names, as far as pickling goes."""

    def package(name: str, **members: type) -> None:
        module = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            setattr(module, key, member)
        monkeypatch.setitem(sys.modules, name, module)

    attributes = type("AttributeDict", (dict,), {})
    read_only = type("ReadOnlyDict", (dict,), {})
    callback = type("ModelCheckpoint", (), {})
    for parent in ("pytorch_lightning", "pytorch_lightning.utilities", "sacred", "sacred.config"):
        package(parent)
    package("pytorch_lightning.callbacks")
    package("pytorch_lightning.utilities.parsing", AttributeDict=attributes)
    package("sacred.config.custom_containers", ReadOnlyDict=read_only)
    package("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=callback)
    return {
        "epoch": 9,
        "pytorch-lightning_version": "1.3.2",
        "state_dict": OrderedDict(STATE),
        "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-5}]}],
        "hyper_parameters": attributes(config=read_only(seed=0, loss_names={"itm": 1})),
        "args": Namespace(lr=1e-5, gpus=[0, 1]),
    }


def test_what_lightning_writes_beside_the_tensors_does_no_harm(lightning, monkeypatch, tmp_path):
    allowed = torch.serialization.get_safe_globals()
    torch.save(lightning, tmp_path / "it.ckpt")
    for name in [name for name in sys.modules if name.startswith(("pytorch_l", "sacred"))]:
        monkeypatch.delitem(sys.modules, name)  # nobody who reads it has these packages
    assert same(checkpoints.read(tmp_path / "it.ckpt", unpickle=True))
    assert not [name for name in sys.modules if name.startswith(("pytorch_l", "sacred"))]
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # for that one file only


class Malicious:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_malicious_file_is_refused_and_nothing_runs(tmp_path, whole, legacy):
    trace = tmp_path / "trace"
    for call in (
        (os.system, f"touch {trace}"),
        (exec, f"open({str(trace)!r}, 'w')"),
        (eval, f"open({str(trace)!r}, 'w')"),
        (getattr, "text", "upper"),
        (os.mkdir, str(trace)),
    ):
        evil = Malicious(*call)
        content = evil if whole else {"state_dict": STATE, "callbacks": [evil]}
        path = tmp_path / "evil.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        name = "posix" if call[0] in (os.system, os.mkdir) else call[0].__name__
        assert f"refused, because reading it would run {name}" in one_line(path)
        assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # as it does where nothing is refused


def test_a_plain_pickle_is_refused_and_nothing_runs(tmp_path):
    trace = tmp_path / "trace"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        evil = Malicious(os.system, f"touch {trace}")
        (tmp_path / "evil.bin").write_bytes(pickle.dumps(evil, protocol=protocol))
        one_line(tmp_path / "evil.bin")
    assert not trace.exists()


def test_the_allowed_names_run_nothing_of_the_files_choosing(tmp_path):
    """A stand-in can be filled, and that is all: not even a callback's own methods are there."""
    for _, name in checkpoints._HARMLESS:
        module, _, attribute = name.rpartition(".")
        path = tmp_path / "odd.ckpt"
        body = f"\x80\x02c{module}\n{attribute}\n(tR.".encode("latin1")
        torch.save({}, path)
        path.write_bytes(body)
        one_line(path)
    stands = {stand for stand, _ in checkpoints._HARMLESS}
    assert stands == {Namespace, dict, list, checkpoints._Callback}


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 1}, {"state_dict": {}}, 7, {1: STATE["a.bias"]}]
)
def test_a_file_without_tensors_by_name(tmp_path, content):
    torch.save(content, tmp_path / "it.pt")
    assert "no tensors by name" in one_line(tmp_path / "it.pt")


def test_damage_is_one_line(tmp_path):
    torch.save(STATE, tmp_path / "it.pt")
    whole = (tmp_path / "it.pt").read_bytes()
    for damaged in (b"", b"PK\x03\x04", whole[:200], whole[:-30], b"\x00" * 64, os.urandom(99)):
        (tmp_path / "it.pt").write_bytes(damaged)
        one_line(tmp_path / "it.pt")
    save_file(STATE, tmp_path / "it.safetensors")
    (tmp_path / "it.safetensors").write_bytes((tmp_path / "it.safetensors").read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"it\.safetensors: not readable"):
        checkpoints.read(tmp_path / "it.safetensors")


def test_nothing_there_and_something_else(tmp_path):
    assert "no such file or folder" in one_line(tmp_path / "none.ckpt")
    assert "no weights in it" in one_line(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a checkpoint" in one_line(tmp_path / "notes.txt")
