"""Several processes that train one student: `torchrun -m crosstill train …`.

Every process draws the same batch, reads the same teacher rows and encodes its own slice. The
slices are gathered and every process computes the same loss on the whole batch, so a queue, a
balancer or a hard negative never sees less than a single process would.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from crosstill.errors import ConfigError
from crosstill.types import Features


@dataclass(frozen=True)
class Group:
    """This process among its peers; a lone process is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def slice_of(self, size: int) -> slice:
        """This process's equal share of a batch."""
        share = self.share_of(size)
        return slice(self.rank * share, (self.rank + 1) * share)

    def share_of(self, size: int) -> int:
        """Number of rows in this process's share of a batch."""
        return size // self.world

    def check(self, batch_size: int) -> None:
        if batch_size % self.world:
            raise ConfigError(
                f"batch_size = {batch_size} does not divide among {self.world} processes"
            )

    def wrap(self, student: nn.Module) -> nn.Module:
        """The student with its gradients averaged over the processes."""
        return DistributedDataParallel(student) if self.world > 1 else student

    def gather(self, features: Features) -> Features:
        """The whole batch's features on every process; gradients reach the own slice only."""
        if self.world == 1:
            return features
        return Features(
            *(
                _Gather.apply(side, self.rank, self.world) if len(side) else side
                for side in features
            )
        )

    def wait(self) -> None:
        if self.world > 1:
            distributed.barrier()


def alone() -> Group:
    """Return the group of a process that has no peers, on the GPU if there is one."""
    return Group(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def leads() -> bool:
    """Whether this process is alone or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def group() -> Iterator[Group]:
    """Join the processes that torchrun started, or be alone; leave them when the block ends."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world == 1:
        yield Group(device=device)
        return
    if cuda:
        torch.cuda.set_device(device)
    joined = not distributed.is_initialized()
    if joined:
        distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Group(distributed.get_rank(), world, device)
    finally:
        if joined:
            distributed.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All-gather whose backward hands each process its own rows.

    Every process holds the gradient of the same whole-batch loss, and DistributedDataParallel
    then averages parameter gradients; the factor `world` turns that average into the sum.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, rank: int, world: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.rank, ctx.world, ctx.size = rank, world, len(rows)
        parts = [torch.empty_like(rows) for _ in range(world)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        mine = grad[ctx.rank * ctx.size : (ctx.rank + 1) * ctx.size]
        return mine * ctx.world, None, None
