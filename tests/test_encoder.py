import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from crosstill import export
from crosstill.bundle import BATCH, Bundle, Encoder
from crosstill.data import scenes as rendered
from crosstill.errors import CorruptError, ImageError
from export.small import take_graphs
from support import small_student

TEXTS = ["a red circle", "", "two blue squares beside a green triangle " * 9, "\ud800 odd", "x"]


@pytest.fixture(scope="module")
def trained(cached):
    """The student of which `bundle` was made."""
    return small_student(cached).eval()


def test_texts_are_the_students(encoder, trained):
    many = TEXTS * 20
    rows = encoder.encode_texts(many)
    assert rows.dtype == np.float32 and rows.shape == (len(many), 16)
    assert np.allclose(rows, trained.embed_texts(many).numpy(), atol=1e-5)
    assert np.allclose(rows[:5], rows[5:10], atol=1e-6)
    assert encoder.count_truncated(TEXTS) == trained.count_truncated(TEXTS) == 1


DOG, SNOW = "\u72d7", "\u2744"
UNKNOWN = ["this model knows none of these words"]


def model(kind: str) -> Tokenizer:
    """A tokenizer that knows "dog" and, of some kinds, any byte."""
    if kind == "bytes":  # CLIP's: its unknown token is the end token, and never met
        tokenizer = Tokenizer(models.BPE(unk_token="<end>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet)
    elif kind == "pieces":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(special_tokens=["<unk>", "<end>"], unk_token="<unk>")
    else:  # drops what it does not know
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(special_tokens=["<end>"])
    trainer.show_progress = False
    tokenizer.train_from_iterator(["dog dog dog"] * 9, trainer)
    end = ("<end>", tokenizer.token_to_id("<end>"))
    tokenizer.post_processor = processors.TemplateProcessing("$0 <end>", special_tokens=[end])
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "notes"), [("bytes", []), ("pieces", UNKNOWN), ("silent", UNKNOWN)]
)
def test_queries_without_a_known_word(bundle, tmp_path, kind, notes):
    model(kind).save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Bundle(**{**vars(bundle), "folder": tmp_path, "max_length": 12}))
    for text in (DOG, f"{SNOW} ", f"{DOG} {SNOW}"):
        assert [note for note in encoder.notes(text) if "none" in note] == notes
    for text in ("dog", f"dog {SNOW}", "", "\n"):
        assert [note for note in encoder.notes(text) if "none" in note] == []
    assert encoder.notes("dog " * 12)[-1:] == ["only the first 11 tokens of this query count"]
    assert encoder.notes("dog") == []


@pytest.mark.parametrize("count", [1, 3, BATCH, BATCH + 1])
def test_images_are_the_students(encoder, trained, count):
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)
    rows = encoder.encode_images(pixels.numpy())
    assert np.allclose(rows, trained.embed_images(pixels).numpy(), atol=1e-5)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_in_eight_bits_a_row_does_not_depend_on_its_company(
    bundle_folder, cached, scenes, tmp_path, monkeypatch
):
    take_graphs(monkeypatch, bundle_folder)
    made = export.onnx(
        small_student(cached), tmp_path / "int8", int8=True, max_loss=1.0, pairs=scenes.split("val")
    )
    encoder = Encoder(Bundle.open(made.folder))
    together = encoder.encode_texts(TEXTS)
    assert np.array_equal(together, np.concatenate([encoder.encode_texts([t]) for t in TEXTS]))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    alone = np.concatenate([encoder.encode_images(photo[None]) for photo in pixels])
    assert np.array_equal(encoder.encode_images(pixels), alone)


def test_nothing_gives_no_rows(encoder):
    assert encoder.encode_texts([]).shape == (0, 16)
    assert encoder.encode_images(np.empty((0, 3, 16, 16), np.uint8)).shape == (0, 16)


def test_several_threads_share_one(encoder):
    alone = encoder.encode_texts(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: encoder.encode_texts(TEXTS), range(20)):
            assert np.array_equal(rows, alone)


def test_unreadable_images_are_named(encoder):
    with pytest.raises(ImageError, match=r"holiday\.jpg: not an image"):
        encoder.load(b"nothing", "holiday.jpg")


def test_a_graph_that_is_none_is_named(bundle, tmp_path):
    for name in bundle.files:
        (tmp_path / name).write_bytes((bundle.folder / name).read_bytes())
    (tmp_path / "text.onnx").write_bytes(b"nothing")
    broken = Bundle(**{**vars(bundle), "folder": tmp_path})
    with pytest.raises(CorruptError, match=r"text\.onnx: not a graph"):
        Encoder(broken).encode_texts(["a"])


def test_a_fresh_interpreter_needs_no_torch(bundle_folder, tmp_path, encoder):
    """What a machine without torch would do: import everything of the search side and encode."""
    rendered.write(tmp_path, 1)
    code = f"""
import sys
for name in ("torch", "transformers", "pyarrow", "torchvision", "sentence_transformers"):
    sys.modules[name] = None  # as if it were not installed
import pkgutil, importlib, pathlib
import crosstill.bundle, crosstill.search, crosstill.cli.app
for found in pkgutil.walk_packages(crosstill.search.__path__, "crosstill.search."):
    importlib.import_module(found.name)
from crosstill.bundle import Bundle
from crosstill.bundle import Encoder
encoder = Encoder(Bundle.open(pathlib.Path({str(bundle_folder)!r})))
pixels = encoder.load(pathlib.Path({str(tmp_path / "000000.png")!r}).read_bytes(), "")
print(encoder.encode_texts(["a"]).shape, encoder.encode_images(pixels[None]).shape)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "(1, 16) (1, 16)", done.stderr
