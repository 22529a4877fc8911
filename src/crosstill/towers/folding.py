"""Frozen batch norms, folded into the convolutions before them while a tower learns."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["fold_norms"]


def fold_norms(tower: nn.Module, encode: Callable[[], Tensor]) -> int:
    """Let a tower's frozen batch norms act through the weights of the convolutions before them.

    With s = γ / √(σ² + ε), norm(conv(x)) is a convolution with the weights w·s and the bias
    (b − μ)·s + β. Only passes that take gradients do this: the norm's own passes over the maps,
    there and back, are left out, while w, b, γ and β get the gradients that they would have had.
    What is saved is as before. Passes without gradients, and norms that learn, keep every bit.

    Args:
        tower: in evaluation mode; changed in place.
        encode: runs it on anything, so that it can be seen which norms follow a convolution
            whose output nothing else reads.

    Returns:
        How many norms are folded.
    """
    makers: dict[Any, nn.Conv2d] = {}
    readers: dict[nn.BatchNorm2d, Any] = {}

    def note_maker(conv: Any, _: Any, output: Tensor) -> None:
        makers[output.grad_fn] = conv

    def note_reader(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        readers[norm] = inputs[0].grad_fn

    hooks: list[Any] = []
    for module in tower.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(note_maker))
        elif type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(note_reader))
    try:
        with torch.enable_grad():
            uses = _uses(encode())
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(norm, makers.get(node)) for norm, node in readers.items() if uses[node] == 1]
    for norm, conv in pairs:
        if conv is not None:
            vars(conv)["forward"] = partial(_convolve, conv, norm)
            vars(norm)["forward"] = partial(_normalise, norm)
    return sum(conv is not None for _, conv in pairs)


def _uses(output: Tensor) -> Counter[Any]:
    """Count how many nodes of the graph of an output read each node."""
    uses: Counter[Any] = Counter()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        for before, _ in node.next_functions if node is not None else ():
            if not uses[before]:
                waiting.append(before)
            uses[before] += 1
    return uses


def _folds(norm: nn.Module) -> bool:
    return torch.is_grad_enabled() and not norm.training


def _convolve(conv: nn.Conv2d, norm: nn.BatchNorm2d, values: Tensor) -> Tensor:
    if not _folds(norm):
        return nn.Conv2d.forward(conv, values)
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv._conv_forward(values, conv.weight * scale[:, None, None, None], shift)


def _normalise(norm: nn.BatchNorm2d, values: Tensor) -> Tensor:
    return values if _folds(norm) else nn.BatchNorm2d.forward(norm, values)
