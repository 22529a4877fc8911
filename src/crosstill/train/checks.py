"""What is made and checked before a run touches its folder."""

from __future__ import annotations

from torch import nn

from crosstill import balance, objectives
from crosstill.balance import Balancer
from crosstill.cache import CacheBase, ScoreCache
from crosstill.errors import ConfigError, MismatchError
from crosstill.train import inside, targets, work
from crosstill.train.config import TrainConfig
from crosstill.train.distributed import Group
from crosstill.train.sampler import Sampler
from crosstill.train.step import check_precision


def prepare(config: TrainConfig, cache: CacheBase, group: Group) -> tuple[nn.ModuleDict, Balancer]:
    """Losses and balancer of a run, after all that can be checked has been."""
    check_precision(config, group.device)
    group.check(config.batch_size)
    cache.split(config.val_split)
    Sampler(cache.split(config.train_split), config.batch_size, config.captions_per_image, 0)
    if config.init_heads == "ridge" and "image" not in cache.modalities:
        raise MismatchError(
            f"init_heads = ridge needs the teacher's image features, and {cache.folder} has none; "
            "use init_heads=random"
        )
    losses = build_losses(config, cache)
    work.check(losses, cache, config, group)
    options = targets.spread(config.balance, losses)
    rule = balance.build(options.pop("name", "fixed"), list(losses), **options)
    blind = [*inside.reading(losses, "hidden"), *inside.reading(losses, "masked")]
    if rule.needs_gradients and blind:
        raise ConfigError(
            f"balance = {config.balance['name']}: compares gradients at the embeddings, where "
            f"{', '.join(blind)} has none; use another balance"
        )
    return losses, rule


def build_losses(config: TrainConfig, cache: CacheBase) -> nn.ModuleDict:
    """The losses of a run, each refused by name if the teacher did not leave what it reads."""
    keys = cache.keys[cache.split(config.train_split).images]

    def make(name: str, dim: int) -> objectives.Objective:
        return objectives.build(name, dim=dim, seed=config.seed, keys=keys, **config.losses[name])

    if config.targets == "each":
        losses = targets.build(config, cache, make)
    else:
        # a width of 1 stands in for that of a cache without features, which is refused next
        losses = {name: make(name, cache.dim or 1) for name in config.losses}
    if isinstance(cache, ScoreCache):
        return nn.ModuleDict(losses)  # whose scores are checked with the lists
    starved = [name for name, loss in losses.items() if loss.needs - cache.modalities]
    if starved:
        lacking = sorted({kind for n in starved for kind in losses[n].needs - cache.modalities})
        raise MismatchError(
            f"{cache.folder} has no {' and '.join(lacking)} features of a teacher, which "
            f"{', '.join(starved)} {'need' if len(starved) > 1 else 'needs'}; "
            + _without(cache.modalities)
        )
    return nn.ModuleDict(losses)


def _without(has: frozenset[str]) -> str:
    """What can be trained from a teacher that left only one side, or none."""
    if not has:
        return "use --recipe info_nce"
    (side,) = has
    return f"""use --recipe info_nce --set 'losses.instance.side="{side}"'"""
