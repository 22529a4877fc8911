"""A token table as the product of two thin ones: the same layers above fewer numbers.

Most of a small text tower is its table of tokens (V, W). The best product (V, r) (r, W) is its
truncated singular value decomposition (Eckart and Young, 1936): the squared error is the sum of
the squares of the singular values that are left out. ALBERT (arXiv 1909.11942, section 3.1) is
trained with such a table from the start.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError


class Factored(nn.Module):
    """Token ids (B, L) → (B, L, W) by way of (B, L, r).

    Args:
        tokens: V.
        rank: r.
        width: W.
        padding: the token that stays as it is in training, if any.
    """

    def __init__(self, tokens: int, rank: int, width: int, padding: int | None) -> None:
        super().__init__()
        self.narrow = nn.Embedding(tokens, rank, padding_idx=padding)
        self.wide = nn.Linear(rank, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.wide(self.narrow(ids))
        return rows

    @torch.no_grad()
    def table(self) -> Tensor:
        """Both multiplied: (V, W)."""
        return self.narrow.weight @ self.wide.weight.T


def fit(tower: Any, rank: int) -> None:
    """Put the best two thin tables in the place of a text tower's table of tokens.

    Raises:
        ConfigError: the table has no more than `rank` columns or rows.
    """
    table = tower.get_input_embeddings().weight.detach()
    if rank > min(table.shape):
        raise ConfigError(
            f"narrow = {rank}: the token table is {table.shape[0]} x {table.shape[1]}; "
            "give less than both"
        )
    left, values, right = torch.linalg.svd(table.double(), full_matrices=False)
    root = values[:rank].sqrt()
    factored = put(tower, rank)
    with torch.no_grad():
        factored.narrow.weight.copy_(left[:, :rank] * root)
        factored.wide.weight.copy_(right[:rank].T * root)


def put(tower: Any, rank: int) -> Factored:
    """Put two thin tables with random numbers there, for weights that are loaded next."""
    old = tower.get_input_embeddings()
    factored = Factored(old.num_embeddings, rank, old.embedding_dim, old.padding_idx)
    tower.set_input_embeddings(factored)
    return factored


def whole(tower: Any) -> Any:
    """A copy of a tower as its family knows it: thin tables are multiplied, others stay."""
    again = copy.deepcopy(tower)
    if any(isinstance(module, Factored) for module in again.modules()):
        table = again.get_input_embeddings()
        again.set_input_embeddings(
            nn.Embedding.from_pretrained(table.table(), padding_idx=table.narrow.padding_idx)
        )
    return again
