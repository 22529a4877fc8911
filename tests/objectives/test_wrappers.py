"""Losses around losses: one loss for each width."""

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.objectives.wrappers import PerWidth, cut, principal_axes
from crosstill.types import Features


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator), dim=1)


@pytest.mark.parametrize("name", objectives.known())
def test_a_wrapper_declares_all_that_its_loss_declares(name):
    loss = objectives.build(name, dim=4, keys=torch.arange(3))
    outer = PerWidth(loss, {}, torch.eye(4), unit=True)
    declared = {key: getattr(loss, key) for key in objectives.Objective.__annotations__}
    assert declared.keys() == {"needs", "reads", "lists", "pairs", "across", "apart"}
    # it cannot rank: scores of lists have no rows to cut
    assert {key: getattr(outer, key) for key in declared} == {**declared, "lists": None}


def test_state_is_kept_under_these_names():
    loss = objectives.build("contrastive", dim=4, queue_size=3)
    queue = [f"queue.{name}" for name in ("entries", "ids", "pointer")]
    parts = {2: objectives.build("contrastive", dim=2, queue_size=3)}
    inner = [*(f"whole.{key}" for key in queue), *(f"parts.2.{key}" for key in queue)]
    assert list(PerWidth(loss, parts, torch.eye(4), unit=True).state_dict()) == inner


def test_a_cut_is_unit_and_an_absent_side_stays_away() -> None:
    both = Features(rows(5, 6), torch.empty(0))
    short = cut(both, torch.eye(6)[:, :3])
    torch.testing.assert_close(short.image, normalize(both.image[:, :3], dim=1))
    assert short.text.shape == (0,)
    long = cut(Features(2 * both.image, both.text), torch.eye(6)[:, :3], unit=False)
    torch.testing.assert_close(long.image, 2 * both.image[:, :3])


def test_a_nested_loss_is_the_mean_over_widths() -> None:
    axes = principal_axes([rows(50, 8)])
    student, teacher = (Features(rows(6, 8, s), rows(6, 8, s + 1)) for s in (2, 4))
    ids = torch.arange(6)

    def make(width: int) -> objectives.Objective:
        return objectives.build("contrastive", dim=width, queue_size=5)

    loss = PerWidth(make(8), {2: make(2), 5: make(5)}, axes, unit=True)
    loss.update(teacher, ids)
    parts = []
    for width, turn in ((8, torch.eye(8)), (2, axes[:, :2]), (5, axes[:, :5])):
        alone = make(width)
        cuts = [cut(side, turn) for side in (student, teacher)]
        alone.update(cuts[1], ids)
        parts.append(alone(*cuts, ids))
    torch.testing.assert_close(loss(student, teacher, ids), torch.stack(parts).mean())
