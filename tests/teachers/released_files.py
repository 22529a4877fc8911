"""State dicts under the names of the released METER checkpoints: full size, or small and real."""

import json
import re
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import RobertaTokenizer

NAMES = Path(__file__).parent / "names"
RETRIEVAL = "meter_clip16_288_roberta"
PRETRAIN = "meter_clip16_288_roberta_pretrain"
STUDENT = "dcd_student_extra"

# released size → small size; heads stay 64 wide, so that there are 2
SMALL = {768: 128, 3072: 192, 2304: 384, 1536: 256, 512: 32, 16: 8}
SMALL |= {577: 17, 325: 5, 514: 50, 50265: 300, 49408: 30, 77: 7}
WORDS = ["Ġred", "Ġblue", "Ġcube", "Ġball", "Ġa"]


def rows(*tables: str, layers: int = 12) -> list[tuple[str, list[int], torch.dtype]]:
    """Name, shape and type of each tensor of the tables; the towers keep so many layers."""
    tower = re.compile(r"(?:vit_model|text_transformer)\..*\.(\d+)\.")
    lines = [line for name in tables for line in (NAMES / f"{name}.tsv").read_text().splitlines()]
    found = []
    for name, shape, kind in (line.split("\t") for line in lines):
        deep = tower.match(name)
        if not deep or int(deep[1]) < layers:
            found.append((name, json.loads(shape), getattr(torch, kind)))
    return found


def on_meta(*tables: str, layers: int = 12) -> dict[str, Tensor]:
    """Everything at its full size, without a byte of memory."""
    found = rows(*tables, layers=layers)
    return {name: torch.empty(shape, dtype=kind, device="meta") for name, shape, kind in found}


def small(*tables: str, layers: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """The same names with small real tensors.

    The values are large enough for scores that differ, and no bias or LayerNorm is at its start.
    """
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape, kind in rows(*tables, layers=layers):
        sizes = [SMALL.get(size, size) for size in shape]
        if kind == torch.int64:
            state[name] = torch.arange(sizes[-1]).expand(sizes).clone()
            continue
        value = torch.randn(sizes, generator=random) * 0.1
        is_norm = re.search(r"(LayerNorm|ln_\w+)\.weight$", name)
        state[name] = 1 + value if is_norm else value
    return state


def write_tokenizer(folder: Path) -> Path:
    """A RoBERTa tokenizer of bytes and a few words: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    vocab = {token: row for row, token in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for token in sorted(ByteLevel.alphabet()):
        vocab[token] = len(vocab)
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    vocab["<mask>"] = len(vocab)
    RobertaTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
    return folder
