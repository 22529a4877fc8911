"""The optimizer and its learning rate, which is a pure function of the step."""

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import nn
from torch.optim import AdamW

from crosstill.train.config import TrainConfig


class Parametrised(Protocol):
    """Anything with named parameters, such as a module."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def build(modules: Iterable[Parametrised], balance: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over everything that learns, in a fixed order.

    Args:
        modules: the student and the losses.
        balance: the balancer; its parameters are no weights of a layer and do not decay.
        config: learning rate and weight decay.
    """
    learnt = [p for module in modules for _, p in _learning(module)]
    groups = [
        {"params": learnt, "weight_decay": config.weight_decay},
        {"params": list(balance.parameters()), "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.lr)


def names(**modules: Parametrised) -> list[str]:
    """Name every parameter that learns, in the order in which `build` takes them."""
    return [f"{key}.{name}" for key, module in modules.items() for name, _ in _learning(module)]


def _learning(module: Parametrised) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def lr_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0 over the whole run."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
        return config.lr * config.gamma**passed
    total = max(1, steps_per_epoch * config.epochs - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / total)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
