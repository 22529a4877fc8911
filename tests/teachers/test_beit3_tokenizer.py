"""BEiT-3's tokenizer: ids by the released rule, and files that are no such tokenizer."""

import random
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from crosstill.errors import ConfigError, ModelError
from crosstill.teachers import beit3_released
from crosstill.teachers.beit3 import Tokenizer
from teachers.beit3_files import small, write_pieces


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return small(layers=1)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    return write_pieces(tmp_path_factory.mktemp("pieces") / "beit3.spm")


def test_ids_are_the_pieces_ids_plus_one(pieces):
    tokenizer = Tokenizer(pieces.read_bytes(), "it", 300, 64)
    plain = SentencePieceProcessor()
    plain.Load(str(pieces))
    text = "a red cube left of a 漢 ball"
    expected = plain.encode(text)
    assert 0 in expected
    ids, mask = tokenizer([text, ""])
    assert ids[0].tolist() == [0, *(i + 1 if i else 3 for i in expected), 2]
    assert ids[1].tolist() == [0, 2] + [1] * len(expected)
    assert mask.tolist() == [[1] * (len(expected) + 2), [1, 1] + [0] * len(expected)]
    assert tokenizer(["<s> </s>"]).ids[0, 1:-1].min() > 2  # a caption cannot spell control ids


def test_long_captions_are_cut_to_62_pieces(pieces):
    tokenizer = Tokenizer(pieces.read_bytes(), "it", 300, 64)
    long = "a red cube " * 60
    ids, mask = tokenizer([long, "a"])
    assert ids.shape == (2, 64) and ids[0, 0] == 0 and ids[0, -1] == 2 and mask[0].all()
    assert tokenizer([long]).ids.tolist() == tokenizer([long + "and a ball"]).ids.tolist()
    plain = SentencePieceProcessor()
    plain.Load(str(pieces))
    texts = ["a" * n for n in range(200)]
    lengths = [len(row) for row in plain.encode(texts)]
    assert {62, 63} <= set(lengths)
    assert tokenizer.count_truncated(texts) == sum(length > 62 for length in lengths)
    assert tokenizer.count_truncated([]) == 0


@pytest.mark.parametrize("data", [b"", b"hello", b"{}", random.Random(0).randbytes(4000), None])
def test_what_is_no_sentencepiece_model_is_one_line(data, state, pieces, tmp_path):
    path = tmp_path / "beit3.spm"
    path.write_bytes(pieces.read_bytes()[:-3] if data is None else data)
    with pytest.raises(ModelError) as refusal:
        beit3_released.load(state, path, "it")
    assert str(refusal.value).startswith(f"{path}: not a SentencePiece model; give the beit3.spm")
    with pytest.raises(ModelError, match="no such file; give the beit3.spm"):
        beit3_released.load(state, tmp_path, "it")


def test_another_models_pieces_are_refused(pieces, tmp_path):
    with pytest.raises(ModelError, match="pieces with the unknown one at 0, where .* 20 words"):
        Tokenizer(pieces.read_bytes(), "it", 20, 64)
    t5 = write_pieces(tmp_path / "t5.spm", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    with pytest.raises(ModelError, match="with the unknown one at 2"):
        Tokenizer(t5.read_bytes(), "it", 300, 64)


def test_without_sentencepiece_the_extra_is_named(state, pieces, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"install it with: pip install 'crosstill\[beit3\]'$"):
        beit3_released.load(state, pieces, "it")
