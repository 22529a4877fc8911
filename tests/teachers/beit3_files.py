"""State dicts under the names of BEiT-3's checkpoints, full size or small, and a tokenizer."""

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

NAMES = Path(__file__).parent / "names"
BASE, BASE_384 = "beit3_base_224", "beit3_base_384"
LARGE_384, GIANT = "beit3_large_384", "beit3_giant_224"
# base → small: 32 pixels in patches of 8, two heads of 64
SMALL = {768: 128, 3072: 192, 16: 8, 199: 19, 64010: 300, 1024: 20}


def rows(table: str) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, in the file's order."""
    lines = (NAMES / f"{table}.tsv").read_text().splitlines()
    parts = [line.split("\t") for line in lines]
    assert all(kind == "float32" for _, _, kind in parts)
    return [(name, tuple(json.loads(shape))) for name, shape, _ in parts]


def on_meta(table: str) -> dict[str, Tensor]:
    """Everything at its full size, without a byte of memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in rows(table)}


def small(layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """The names of base with small real tensors; no bias or LayerNorm is at its start."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in rows(BASE):
        deep = re.search(r"layers\.(\d+)\.", name)
        if deep and int(deep[1]) >= layers:
            continue
        value = torch.randn([SMALL.get(size, size) for size in shape], generator=random) * 0.1
        is_norm = re.search(r"(norm|_ln)\.([AB]\.)?weight$", name)
        state[name] = 1 + value if is_norm else value
    return state


SENTENCES = ["a red cube left of a blue ball", "two big green cones", "a small yellow ball"] * 4


def write_pieces(path: Path, texts: Iterable[str] = SENTENCES, **settings: int) -> Path:
    """Train a SentencePiece model; without settings its ids are as those of beit3.spm."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        **{"vocab_size": 120, **settings},
    )
    path.write_bytes(written.getvalue())
    return path
