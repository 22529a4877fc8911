"""The parts of a training step that every Task shares.

Weights, chunks, precision, and the optimizer with its learning rate, a pure function of the step.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW

from crosstill.balance import Balancer
from crosstill.errors import ConfigError, NonFiniteError
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.types import Features


@dataclass(frozen=True)
class Outcome:
    """The losses and weights of one step; scalars, detached."""

    losses: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    total: Tensor


def weigh(
    losses: Mapping[str, Tensor], balance: Balancer, features: Features | None
) -> tuple[Outcome, Tensor]:
    """Add up the losses under the balancer's weights.

    Args:
        losses: one scalar for each, with gradient.
        balance: the weighting rule, which takes note of the step.
        features: the student's, for a rule that compares gradients at them.

    Returns:
        The step's outcome, and the total with gradient.

    Raises:
        NonFiniteError: a loss or the total is NaN or infinite.
    """
    if balance.needs_gradients and features is not None:
        balance.watch({name: _norm(loss, features) for name, loss in losses.items()})
    weights = balance.weights({name: loss.detach() for name, loss in losses.items()})
    total = sum((weights[name] * losses[name] for name in losses), balance.penalty())
    for name, value in {**losses, "total": total}.items():
        if not math.isfinite(value.item()):
            what = "the total loss" if name == "total" else f"loss {name!r}"
            raise NonFiniteError(f"{what} became {value.item()}")
    detached = {name: loss.detach() for name, loss in losses.items()}
    weighed = {name: weight.detach() for name, weight in weights.items()}
    return Outcome(detached, weighed, total.detach()), total


def backward_in_chunks(
    embed: Callable[[slice], Features],
    chunks: Sequence[slice],
    lose: Callable[[Features], tuple[Outcome, Tensor]],
    wrapped: nn.Module,
    group: Group,
) -> Outcome:
    """Compute the whole batch's gradient in the memory of one chunk (GradCache, arXiv 2101.06983).

    Embed all chunks without a graph, take the loss's gradient at the embeddings, then embed each
    chunk again under the same random state and carry its slice of that gradient back.

    Args:
        embed: student features of some rows.
        chunks: rows of each pass, in order.
        lose: outcome and total of the features of all rows.
        wrapped: the student as `Group.wrap` gives it; its gradients travel between processes once,
            with the last chunk.
        group: the processes that train.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_dropout_state(group.device))
            parts.append(embed(chunk))
    leaf = Features(*(torch.cat(side).requires_grad_() for side in zip(*parts, strict=True)))
    outcome, total = lose(leaf)
    total.backward()
    for chunk, state in zip(chunks, states, strict=True):
        _restore_dropout(state, group.device)
        waits: Any = group.world > 1 and chunk is not chunks[-1]
        with wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
            again = embed(chunk)
            sides = [(side, like.grad) for side, like in zip(again, leaf, strict=True)]
            reached = [
                (side, grad[chunk])
                for side, grad in sides
                if grad is not None and side.requires_grad
            ]
            torch.autograd.backward([side for side, _ in reached], [grad for _, grad in reached])
    return outcome


@contextmanager
def autocast(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute a block in bfloat16 where the settings say so."""
    if config.precision == "fp32":
        yield
        return
    # measured without dropout: a CPU's fused attention makes a text tower's pass twice as long
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, torch.autocast(device.type, torch.bfloat16):
        yield


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse bf16 where it would be emulated and a hundred times slower than fp32."""
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("amx_tile", False)
    if config.precision == "bf16" and not fast:
        raise ConfigError("precision = bf16: this processor has no AMX; use precision=fp32")


class Parametrised(Protocol):
    """Anything with named parameters, such as a module."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def build_optimizer(
    modules: Iterable[Parametrised],
    balance: nn.Module,
    config: TrainConfig,
    fusion_layers: Iterable[nn.Parameter] = (),
) -> AdamW:
    """Build AdamW over everything that learns, in a fixed order.

    A group's key "factor", where it has one, multiplies the learning rate of every step.

    Args:
        modules: the student and the losses.
        balance: the balancer; its parameters are no weights of a layer and do not decay.
        config: learning rates, weight decay and betas.
        fusion_layers: the student's parameters that learn `fusion_lr` times as fast.
    """
    learnt = [p for module in modules for _, p in _learning(module)]
    fast = {id(p) for p in fusion_layers} if config.fusion_lr != 1 else set()
    groups: list[dict[str, Any]] = []
    for faster, decays in itertools.product((False, True), (True, False)):
        part = [
            p
            for p in learnt
            if (id(p) in fast) == faster and (config.decay == "all" or p.ndim > 1) == decays
        ]
        rate = {"factor": config.fusion_lr} if faster else {}
        groups.append({"params": part, "weight_decay": config.weight_decay * decays, **rate})
    groups.append({"params": list(balance.parameters()), "weight_decay": 0.0})
    learning = [group for group in groups if group["params"]]
    return AdamW(learning, config.lr, config.betas, fused=True)


def load_optimizer(optimizer: AdamW, state: dict[str, Any]) -> None:
    """Set an optimizer to a saved state.

    A fused step walks a parameter and its moments in the order of their memory, so moments get the
    layout of their parameter back, which files do not keep.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def parameter_names(**modules: Parametrised) -> list[str]:
    """Name every parameter that learns; with the settings they decide the optimizer's order."""
    return [f"{key}.{name}" for key, module in modules.items() for name, _ in _learning(module)]


def _learning(module: Parametrised) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def lr_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 0 over the whole run."""
    total = steps_per_epoch * config.epochs
    warmup = config.warmup_steps or round(config.warmup_share * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
        return config.lr * config.gamma**passed
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _norm(loss: Tensor, features: Features) -> Tensor:
    """Compute the norm of a loss's gradient at the features that reach the towers."""
    wanted = [side for side in features if side.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    return torch.stack([g.double().norm() for g in gradients if g is not None]).norm()


def _dropout_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _restore_dropout(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
