"""BEiT-3's tokenizer: a SentencePiece model, and the ids that its checkpoints count by.

<s> 0, padding 1, </s> 2, unknown 3; any other piece has its SentencePiece id plus one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crosstill.errors import ConfigError, ModelError
from crosstill.formats import encodable

BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3


class Tokens(NamedTuple):
    """A padded batch of texts."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) int64, 0 where padded


class Tokenizer:
    """Texts → ids.

    Args:
        data: the bytes of a SentencePiece model (`beit3.spm`).
        origin: where they came from, for messages.
        words: rows of the model's word table.
        length: ids of a text, <s> and </s> included; the rest is cut off.

    Raises:
        ConfigError: sentencepiece is not installed.
        ModelError: it is no SentencePiece model, or another model's.
    """

    def __init__(self, data: bytes, origin: str, words: int, length: int) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ConfigError(
                "BEiT-3's tokenizer needs sentencepiece; install it with: "
                "pip install 'crosstill[beit3]'"
            ) from None
        self.data, self.length = data, length
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError:
            raise ModelError(
                f"{origin}: not a SentencePiece model; give the beit3.spm that the checkpoints "
                "come with"
            ) from None
        count, unknown = self._pieces.get_piece_size(), self._pieces.unk_id()
        if unknown != 0 or count + 1 > words:
            raise ModelError(
                f"{origin}: {count} pieces with the unknown one at {unknown}, where the checkpoint "
                f"has {words} words and counts it as 0; give its own beit3.spm"
            )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """B texts → ids and mask (B, L), padded to the longest; an empty one is <s> </s>."""
        rows = [[BOS, *row[: self.length - 2], EOS] for row in self._encode(texts)]
        longest = max(map(len, rows), default=0)
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return Tokens(ids, mask)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are cut."""
        return sum(len(row) + 2 > self.length for row in self._encode(texts))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = self._pieces.encode([encodable(text) for text in texts])
        return [[piece + 1 if piece else UNKNOWN for piece in row] for row in pieces]
