import random

import numpy as np
import pytest
import torch

from crosstill.errors import CorruptError
from crosstill.train import checkpoint
from support import cut, flip, same


def state(value: float) -> checkpoint.State:
    return {
        "student": {"weight": torch.full((50, 40), value)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "losses": {"contrastive.queue": torch.randn(2, 8, 4)},
        "balance": {},
        "names": {"losses": ["contrastive"], "parameters": ["student.weight"]},
        "position": {"epoch": 1, "step": 2, "total": 3},
        "best": {"rsum": 0.1 + 0.2, "epoch": None},
        **checkpoint.rng_state(),
    }


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = state(1.0)
    checkpoint.save(tmp_path, 3, saved, keep=2)
    assert same(checkpoint.load_latest(tmp_path), saved)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert len(list(tmp_path.iterdir())) == 4
    assert checkpoint.load_latest(tmp_path)["student"]["weight"][0, 0] == 4


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None


@pytest.mark.parametrize("piece", checkpoint.PIECES)
def test_a_checkpoint_without_a_piece_is_refused(tmp_path, piece):
    incomplete = state(1.0)
    del incomplete[piece]
    checkpoint.save(tmp_path, 1, incomplete, keep=2)
    with pytest.raises(CorruptError, match=f"lacks {piece}"):
        checkpoint.load(tmp_path / "step-000000001.json")


def test_random_generators_go_on_where_they_were():
    saved = checkpoint.rng_state()
    wanted = torch.rand(3), np.random.rand(3), random.random()
    torch.rand(7), np.random.rand(5), random.random()
    checkpoint.restore_rng(saved)
    assert torch.equal(torch.rand(3), wanted[0])
    assert (np.random.rand(3) == wanted[1]).all()
    assert random.random() == wanted[2]


def damaged_files(folder, count: int, damage):
    """Damage a random place of the newest checkpoint `count` times, putting it back each time."""
    choose = np.random.default_rng(0)
    newest = sorted(folder.glob("step-*2.*"))
    for _ in range(count):
        path = newest[int(choose.integers(len(newest)))]
        whole = path.read_bytes()
        path.write_bytes(damage(whole, choose))
        yield path
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage, count):
    older, newer = state(1.0), state(2.0)
    checkpoint.save(tmp_path, 1, older, keep=2)
    checkpoint.save(tmp_path, 2, newer, keep=2)
    for path in damaged_files(tmp_path, count, damage):
        caplog.clear()
        loaded = checkpoint.load_latest(tmp_path)
        if same(loaded, newer):
            # only the white space of the small JSON may change without meaning anything
            assert path.suffix == ".json" and not caplog.text
        else:
            assert same(loaded, older) and path.stem in caplog.text


def test_when_all_are_damaged_nothing_is_loaded(tmp_path):
    checkpoint.save(tmp_path, 1, state(1.0), keep=2)
    (tmp_path / "step-000000001.safetensors").write_bytes(b"")
    with pytest.raises(CorruptError, match="every checkpoint is damaged"):
        checkpoint.load_latest(tmp_path)
