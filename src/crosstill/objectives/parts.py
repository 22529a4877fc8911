"""Parts that several losses are made of: scores of a batch, and memories of earlier rows.

Entries that show the query's own image are never negatives: every function of scores takes the ids
of the images, or a mask made of them, and leaves such entries out. Of the memories `Queue` holds
the newest rows of any images, `Bank` one row of each training image.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError
from crosstill.plugins import positive
from crosstill.types import Features, Ids

NOBODY = -1  # the id of a random vector, which no image and no text has


class Side(NamedTuple):
    """The rows of one modality in a batch, B of them."""

    student: Tensor  # (B, D)
    teacher: Tensor  # (B, D), without gradient
    ids: Tensor  # (B,)
    number: int  # 0 for images, 1 for texts


def sides(
    student: Features,
    teacher: Features,
    ids: Tensor | Ids,
    names: Collection[str] = ("image", "text"),
) -> list[Side]:
    """List the sides of a batch that have rows, images first."""
    every = both_ids(ids)
    return [
        Side(student[number], teacher[number].detach(), (every.image, every.text)[number], number)
        for number, name in enumerate(student._fields)
        if name in names and len(student[number])
    ]


def both_ids(ids: Tensor | Ids) -> Ids:
    """Return the ids of both sides, where a tensor means that all rows are pairs."""
    return ids if isinstance(ids, Ids) else Ids(ids, ids, len(ids))


def first_rows(features: Features, count: int) -> Features:
    """Return the first rows of both sides, the very tensors where they have no others.

    Even a slice of all rows would have gradients added up in another order.
    """
    return Features(*(side if len(side) == count else side[:count] for side in features))


def total(terms: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Add up the terms of the sides that have rows; `zero` is a tensor to take a 0 from."""
    return torch.stack([*terms]).sum() if terms else zero.new_zeros(())


def widened(values: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if it is float32 or wider."""
    return values if values.dtype.itemsize >= 4 else values.float()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return all dot products of the rows of a (A, D) and b (B, D): (A, B), float32 or wider.

    Eight bits of mantissa, divided by a temperature of 0.05, would move a logit by 0.08.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ b.to(wide).T


class BatchLogits(NamedTuple):
    """B image rows, then B caption rows; row i and row B + i have their partner in column i.

    Of Bv photos and Bt texts there are Bv + Bt rows, and as many columns as the longer side has;
    what is too much for the other side's rows is absent.
    """

    student: Tensor  # (2B, B)
    teacher: Tensor  # (2B, B), without gradient
    absent: Tensor  # (2B, B) bool, other rows of the row's own image: neither right nor wrong
    target: Tensor  # (2B,) int64, the column of the true partner, of rows that have one


def batch_logits(
    student: Features, teacher: Features, ids: Tensor | Ids, temperature: float
) -> BatchLogits:
    """Score each image against all captions and each caption against all images.

    Args:
        student: image and text, (B, D) each, or of different lengths.
        teacher: the same.
        ids: which image each row shows; neither side may be empty.
        temperature: the divisor of the cosines.
    """
    image_ids, text_ids, paired = both_ids(ids)
    image, text = (torch.arange(len(x), device=x.device) for x in (image_ids, text_ids))
    partners = (image[:, None] == text) & (text < paired)
    absent = (image_ids[:, None] == text_ids) & ~partners
    student_scores, teacher_scores = similarity(*student), similarity(*teacher).detach()
    return BatchLogits(
        _both_ways(student_scores, 0) / temperature,
        _both_ways(teacher_scores, 0) / temperature,
        _both_ways(absent, True),
        torch.cat([image, text]),
    )


def _both_ways(matrix: Tensor, filling: Any) -> Tensor:
    """Stack a matrix (Bv, Bt) and its transpose, the shorter rows filled up."""
    columns = max(matrix.shape)
    return torch.cat(
        [
            nn.functional.pad(part, (0, columns - part.shape[1]), value=filling)
            for part in (matrix, matrix.T)
        ]
    )


def divergence(student: Tensor, teacher: Tensor, absent: Tensor) -> Tensor:
    """Compute KL(softmax(teacher) ‖ softmax(student)) of each row: (R,).

    Args:
        student: (R, N) logits.
        teacher: (R, N) logits.
        absent: (R, N) bool, entries left out of both softmaxes; each row keeps one or more.
    """
    log_p = teacher.masked_fill(absent, -torch.inf).log_softmax(1)
    log_q = student.masked_fill(absent, -torch.inf).log_softmax(1)
    # an absent entry is 0 * (-inf + inf), which is no number, and means 0
    return (log_p.exp() * (log_p - log_q).masked_fill(absent, 0)).sum(1)


def others(ids: Tensor) -> Tensor:
    """Return (B, B) bool: True where the column shows another image than the row; ids are (B,)."""
    return ids[:, None] != ids


def logits(queries: Tensor, partners: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return cosines of (B, D) queries and (B, D) partners over the temperature, (B, B).

    Another row of the query's own image is -inf: it is neither its partner nor a negative.
    """
    own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    scores = similarity(queries, partners) / temperature
    return scores.masked_fill(~(others(ids) | own), -torch.inf)


def diagonal_cross_entropy(logits: Tensor) -> Tensor:
    """Compute the mean over the rows of (B, B) logits of -log softmax at the diagonal."""
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def contrast(queries: Features, partners: Features, ids: Tensor, temperature: float) -> Tensor:
    """Compute InfoNCE: images against captions, captions against images, mean of both.

    Args:
        queries: (B, D) image and text.
        partners: (B, D) text and image to find; may be the same as `queries`.
        ids: (B,) which image each row shows; another row of it is no negative.
        temperature: the divisor of the cosines.
    """
    image = diagonal_cross_entropy(logits(queries.image, partners.text, ids, temperature))
    text = diagonal_cross_entropy(logits(queries.text, partners.image, ids, temperature))
    return (image + text) / 2


class Candidates(NamedTuple):
    """The N candidate partners of each of B queries, as columns of a (B, B) score matrix."""

    columns: Tensor  # (B, N) int64; column 0 is the query's own partner
    valid: Tensor  # (B, N) bool; False fills up a list that is shorter than others

    def pick(self, scores: Tensor) -> Tensor:
        """Return the (B, N) scores of these candidates out of (B, B) scores of all partners."""
        return scores.gather(1, self.columns)


def hardest(teacher: Tensor, student: Tensor, ids: Tensor, count: int) -> Candidates:
    """List each query's own partner and the other images' partners that the teacher scores best.

    A tie of the teacher goes to the one that the student scores better, so that the order of
    the batch never decides.

    Args:
        teacher: (B, B) scores, row i and column i belong together.
        student: (B, B) scores of the same pairs.
        ids: (B,), which image each row and column shows.
        count: negatives, at most; a batch that has fewer gives all that it has.

    Returns:
        N = 1 + min(count, B - 1) candidates, the negatives from hard to easy.
    """
    negative = others(ids)
    order = _descending(teacher.masked_fill(~negative, -torch.inf), student)
    order = order[:, : min(count, len(ids) - 1)]
    own = torch.arange(len(ids), device=ids.device)[:, None]
    valid = torch.cat([torch.ones_like(own, dtype=torch.bool), negative.gather(1, order)], 1)
    return Candidates(torch.cat([own, order], 1), valid)


def list_cross_entropy(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute -log softmax at column 0 of (B, N) scores, of the valid entries: (B,).

    Written as log(1 + sum_j exp(s_j - s_0)), which keeps its digits where it is almost 0; the
    focal weight of DCD divides by it.
    """
    negative = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid.clone()
    negative[:, 0] = False
    # not -inf: a row without negatives would meet -inf - (-inf) on the way back
    gaps = (scores - scores[:, :1]).masked_fill(~negative, torch.finfo(scores.dtype).min)
    return nn.functional.softplus(gaps.logsumexp(1))


def _descending(first: Tensor, second: Tensor) -> Tensor:
    """Sort the columns of each row by `first`, ties by `second`; both (B, B), highest in front."""
    order = second.argsort(dim=1, descending=True, stable=True)
    again = first.gather(1, order).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, again)


class Queue(nn.Module):
    """Keep the newest K image and K text embeddings with their ids.

    It starts as random unit vectors, is float32, and takes batches of any size, of as many photos
    and texts as there are. Checkpoints from before it could have one row of ids and one pointer
    for both sides.

    Buffers:
        entries: (2, K, D) image rows, then text rows.
        ids: (2, K) int64, `NOBODY` for the random start.
        pointer: (2,) int64, the oldest slot, which is the next to be overwritten.
    """

    entries: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, length: int, dim: int, seed: int) -> None:
        super().__init__()
        positive(queue_size=length, dim=dim)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, length, dim, generator=generator)
        self.register_buffer("entries", nn.functional.normalize(noise, dim=-1))
        self.register_buffer("ids", torch.full((2, length), NOBODY))
        self.register_buffer("pointer", torch.zeros(2, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_split_sides)

    def __len__(self) -> int:
        return self.ids.shape[1]

    @torch.no_grad()
    def push(self, features: Features, ids: Tensor | Ids) -> None:
        """Overwrite the oldest slots; of a batch longer than the queue the last rows stay."""
        length, every = len(self), both_ids(ids)
        for side, (rows, row_ids) in enumerate(
            zip(features, (every.image, every.text), strict=True)
        ):
            if not len(rows):
                continue  # it may have no width either
            count = min(len(rows), length)
            slots = self.pointer[side] + torch.arange(count, device=self.ids.device)
            slots %= length
            self.entries[side, slots] = rows[-length:].to(self.entries)
            self.ids[side, slots] = row_ids[-length:].to(self.ids)
            self.pointer[side] = (self.pointer[side] + count) % length


def _split_sides(queue: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    """Give each side of an older queue its own ids and pointer, which were the same for both."""
    ids, pointer = (state.get(prefix + name) for name in ("ids", "pointer"))
    if ids is not None and pointer is not None and not pointer.ndim:
        state[prefix + "ids"], state[prefix + "pointer"] = ids.expand(2, -1), pointer.expand(2)


class Bank(nn.Module):
    """Keep one image row and one text row, float32, for each of I images.

    It starts as random unit vectors. At I = 113,000 and D = 512 it takes 463 MB.

    Buffers:
        entries: (2, I, D) image rows, then text rows.
        keys: (I,) int64, whose row it is, ascending.
    """

    entries: Tensor
    keys: Tensor

    def __init__(self, keys: Tensor, dim: int, seed: int) -> None:
        super().__init__()
        positive(dim=dim)
        if not len(keys):
            raise ConfigError("keys is empty; give the keys of all training images")
        generator = torch.Generator().manual_seed(seed)
        owners = keys.unique()
        noise = torch.randn(2, len(owners), dim, generator=generator)
        self.register_buffer("entries", nn.functional.normalize(noise, dim=-1))
        self.register_buffer("keys", owners)

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, ids: Tensor) -> Tensor:
        """Return the row of each id: (B,) int64.

        Raises:
            ConfigError: an id has no row.
        """
        rows = torch.searchsorted(self.keys, ids).clamp_max(len(self) - 1)
        if (unknown := self.keys[rows] != ids).any():
            raise ConfigError(
                f"the bank has no row for image key {int(ids[unknown][0])}; "
                "give the loss the keys of all training images"
            )
        return rows

    @torch.no_grad()
    def blend(self, features: Features, rows: Tensor, momentum: float) -> None:
        """Move rows towards a batch: momentum · old + (1 - momentum) · new, made unit again.

        An image that occurs several times moves once, towards the mean of its occurrences.

        Args:
            features: (B, D) image and text.
            rows: (B,) their rows in the bank.
            momentum: share of the old row that stays.
        """
        moved, place = rows.unique(return_inverse=True)
        # a product, for index_add on a GPU sums in no fixed order
        shares = (place == torch.arange(len(moved), device=rows.device)[:, None]).to(self.entries)
        shares = shares / shares.sum(1, keepdim=True)
        with torch.autocast(rows.device.type, enabled=False):
            new = torch.stack([shares @ side.to(self.entries) for side in features])
        mixed = momentum * self.entries[:, moved] + (1 - momentum) * new
        self.entries[:, moved] = nn.functional.normalize(mixed, dim=-1)


def draw(seed: int, step: int, count: int, length: int) -> Tensor:
    """Draw `count` rows of a bank of `length`, with replacement: (count,) int64.

    A pure function of its arguments: the same in every process and after a restart.
    """
    random = np.random.default_rng([seed, step])
    return torch.from_numpy(random.integers(length, size=count))
