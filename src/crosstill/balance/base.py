"""The base class of all balancers: loss values in, weights out, state in buffers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crosstill.errors import ConfigError

LARGEST = torch.finfo(torch.float32).max


class Balancer(nn.Module):
    """Base of all balancers. Arithmetic is in float64; `state_dict` is all of the state.

    Args:
        tasks: names of the losses; row i of every buffer belongs to `tasks[i]`.
    """

    steps: Tensor
    needs_gradients: bool = False  # whether `watch` has to be called before each step

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ConfigError(f"a balancer needs distinct losses, not {list(tasks)}")
        self.tasks = tuple(tasks)
        self.register_buffer("steps", torch.tensor(0))

    def weights(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weight of every loss from this step's values; called once a step.

        Args:
            losses: one scalar for each of `tasks`; no gradient flows back through the weights.

        Returns:
            Scalars of the losses' type, float32 at least; finite and never negative.
        """
        raise NotImplementedError

    def watch(self, norms: Mapping[str, Tensor]) -> None:
        """Store the norm of each loss's gradient at the student's features (B, D).

        Called before `weights` if `needs_gradients` is set.
        """

    def penalty(self) -> Tensor:
        """Return the term that the total has on top of the weighted losses."""
        return self.steps.new_zeros((), dtype=torch.float32)

    def end_epoch(self) -> None:
        """Update the state after each epoch; only `dwa` uses it."""

    def check(self, losses: Mapping[str, Tensor]) -> None:
        """Refuse losses other than those that the balancer was built for.

        Raises:
            ConfigError: names are missing or unknown.
        """
        if set(losses) != set(self.tasks):
            raise ConfigError(
                f"the balancer weighs {', '.join(self.tasks)}, but got {', '.join(losses)}; "
                "build it for those losses"
            )

    def values(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Stack the losses as (n,) float64 in the order of `tasks`, without gradient.

        Raises:
            ConfigError: as `check`.
        """
        self.check(losses)
        rows = torch.stack([losses[task].detach().double() for task in self.tasks])
        return rows.clamp(-LARGEST, LARGEST)

    def label(self, weights: Tensor, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name (n,) weights by their tasks, in the type of the losses."""
        safe = weights.clamp(0, LARGEST)
        return {
            task: w.to(torch.promote_types(losses[task].dtype, torch.float32))
            for task, w in zip(self.tasks, safe, strict=True)
        }


def shares(rates: Tensor, temperature: float, total: float) -> Tensor:
    """Compute total * softmax(rates (n,) / temperature); finite even for infinite rates."""
    logits = (rates / temperature).clamp(max=torch.finfo(torch.float64).max)
    return total * torch.softmax(logits, 0)
