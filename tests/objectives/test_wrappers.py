"""Losses around losses: one for each teacher, one for each width."""

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.objectives.wrappers import PerTeacher, PerWidth, TeacherMap, cut
from crosstill.students import matryoshka
from crosstill.types import Features

DIM, WIDE = 12, 24


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, width, generator=generator), dim=1)


def wrapped(loss: objectives.Objective) -> dict[str, objectives.Objective]:
    """A loss inside each wrapper."""
    return {
        "teacher": PerTeacher(loss, TeacherMap(slice(0, 4), seed=0, unit=True), share=0.25),
        "width": PerWidth(loss, {}, torch.eye(4), unit=True),
    }


@pytest.mark.parametrize("kind", ["teacher", "width"])
@pytest.mark.parametrize("name", objectives.known())
def test_a_wrapper_declares_all_that_its_loss_declares(name, kind):
    loss = objectives.build(name, dim=4, keys=torch.arange(3))
    loss.share = 0.5
    outer = wrapped(loss)[kind]
    declared = {key: getattr(loss, key) for key in objectives.Objective.__annotations__}
    assert declared.keys() == {"needs", "reads", "lists", "share"}
    # no wrapper can rank: scores of lists have no rows to map or cut
    changed = {"lists": None, "share": 0.125 if kind == "teacher" else 0.5}
    assert {key: getattr(outer, key) for key in declared} == {**declared, **changed}


def test_state_is_kept_under_these_names():
    loss = objectives.build("contrastive", dim=4, queue_size=3)
    outer = wrapped(loss)["teacher"]
    outer.target.reset(2)
    queue = [f"queue.{name}" for name in ("entries", "ids", "pointer")]
    assert list(outer.state_dict()) == [*(f"loss.{key}" for key in queue), "target.weight"]
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
    axes = matryoshka.axes([rows(50, 8)])
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


def test_a_map_begins_with_the_cosines_of_the_student():
    target = TeacherMap(slice(3, 3 + WIDE), seed=0, unit=True)
    target.reset(DIM)
    rows = normalize(torch.randn(5, DIM), dim=1)
    image, text = target.project(Features(rows, rows.flip(0)))
    assert image.shape == (5, WIDE)
    torch.testing.assert_close(image @ text.T, rows @ rows.flip(0).T)
    before = target.weight.clone()
    target.reset(DIM)
    assert torch.equal(before, target.weight)


def test_a_map_settles_at_the_nearest_one_that_turns():
    target = TeacherMap(slice(0, WIDE), seed=0, unit=True)
    target.reset(DIM)
    noise = torch.randn(WIDE, DIM, generator=torch.Generator().manual_seed(1))
    moved = target.map.detach() + 0.02 * noise
    target.assign(moved)
    for _ in range(3):
        target.reorthogonalise()
    u, _, v = torch.linalg.svd(moved, full_matrices=False)
    torch.testing.assert_close(target.map.detach(), u @ v, atol=1e-5, rtol=0)


def test_a_side_that_no_teacher_has_stays_empty():
    target = TeacherMap(slice(2, 4), seed=0, unit=True)
    rows = target.own_rows(Features(torch.tensor([[1.0, 1.0, 0.0, 5.0]]), torch.empty(0)))
    assert rows.image.tolist() == [[0.0, 1.0]] and rows.text.shape == (0,)
