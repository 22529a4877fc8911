"""What every balancer is: loss values in, weights out, state in buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError

LARGEST = torch.finfo(torch.float32).max


class Rule(nn.Module):
    """Base of all balancers. Arithmetic is in float64; `state_dict` is all of the state.

    Args:
        tasks: names of the losses; row i of every buffer belongs to `tasks[i]`.
    """

    steps: Tensor
    needs_gradients = False  # whether `watch` wants to be told before each step

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ConfigError(f"a balancer needs distinct losses, not {list(tasks)}")
        self.tasks = tuple(tasks)
        self.register_buffer("steps", torch.tensor(0))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weight of every loss, for the step that gave these values; call once a step.

        Args:
            losses: one scalar for each of `tasks`; no gradient flows back through the weights.

        Returns:
            Scalars of the losses' type, float32 at least; finite and never negative.
        """
        raise NotImplementedError

    def watch(self, norms: Mapping[str, Tensor]) -> None:
        """Take note of the norm of each loss's gradient at the student's features (B, D).

        Called before `weights` if `needs_gradients` is set.
        """

    def penalty(self) -> Tensor:
        """What the total has on top of the weighted losses."""
        return self.steps.new_zeros((), dtype=torch.float32)

    def end_epoch(self) -> None:
        """Tell the rule that an epoch is over; few care."""

    def values(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The losses as (n,) float64 in the order of `tasks`, without gradient.

        Raises:
            ConfigError: the losses are not those that the balancer was built for.
        """
        if set(losses) != set(self.tasks):
            raise ConfigError(
                f"the balancer weighs {', '.join(self.tasks)}, but got {', '.join(losses)}; "
                "build it for those losses"
            )
        rows = torch.stack([losses[task].detach().double() for task in self.tasks])
        return rows.clamp(-LARGEST, LARGEST)

    def label(self, weights: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give (n,) weights back under their names, in the type of the losses."""
        safe = weights.clamp(0, LARGEST)
        return {
            task: w.to(torch.promote_types(losses[task].dtype, torch.float32))
            for task, w in zip(self.tasks, safe, strict=True)
        }


def shares(rates: Tensor, temperature: float, total: float) -> Tensor:
    """Softmax of rates (n,) / temperature, times total; finite even for infinite rates."""
    logits = (rates / temperature).clamp(max=torch.finfo(torch.float64).max)
    return total * torch.softmax(logits, 0)
