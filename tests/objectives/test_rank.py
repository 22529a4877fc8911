"""Losses over the candidate lists of a score cache."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.parts import hardest, similarity
from crosstill.types import Features, Lists


def made(name):
    return objectives.build(name, dim=4, keys=torch.arange(6))


RANKING = [name for name in objectives.known() if made(name).lists]
OTHERS = [name for name in objectives.known() if name not in RANKING]


def rows(seed, batch=6, dim=5):
    random = torch.Generator().manual_seed(seed)
    sides = (torch.randn(batch, dim, generator=random, dtype=torch.float64) for _ in range(2))
    return Features(*(normalize(side, dim=1) for side in sides))


def lists(seed=0, batch=6, size=5, features=None):
    random = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(batch, size, generator=random, dtype=torch.float64)

    told = {way: draw() for way in ("image", "text")}
    for way, scores in told.items():
        told[way] = torch.cat([scores[:, :1], scores[:, 1:].sort(dim=1, descending=True)[0]], 1)
    valid = torch.ones(batch, size, dtype=torch.bool)
    valid[0, 3:] = False
    return Lists(
        {way: draw().requires_grad_() for way in told},
        {way: scores for way, scores in told.items()},
        dict.fromkeys(told, valid),
        torch.arange(batch),
        features,
    )


def test_some_losses_rank():
    assert {"dcd", "cprd", "info_nce"} <= set(RANKING)


@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_without_lists_says_so(name):
    with pytest.raises(ConfigError, match="score cache"):
        made(name).rank(lists())


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("dual", [False, True])
def test_contract_of_every_loss_that_ranks(name, dual):
    loss = objectives.build(name, hardest=3)
    own = Features(*(side.requires_grad_() for side in rows(3))) if dual else None
    said = lists(features=own)
    value = loss.rank(said)
    assert value.ndim == 0 and value.isfinite()
    value.backward()
    leaves = [*said.student.values(), *(own or ())]
    assert any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)
    for scores in said.student.values():
        if scores.grad is not None:
            assert not scores.grad[:, 4:].any()  # behind the three hardest
            assert not scores.grad[0, 3:].any()  # not there
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    shuffled = Lists(
        {way: s[order] for way, s in said.student.items()},
        {way: s[order] for way, s in said.teacher.items()},
        {way: valid[order] for way, valid in said.valid.items()},
        said.ids[order],
        Features(*(side[order] for side in own)) if own else None,
    )
    assert loss.rank(shuffled).item() == pytest.approx(value.item(), rel=1e-9)


@pytest.mark.parametrize("variant", ["uncertainty", "focal", "plain"])
def test_dcd_over_lists_is_dcd_over_the_batch_that_they_came_from(variant):
    student, teacher, ids = rows(1), rows(2), torch.arange(6)
    dense = objectives.build("dcd", hardest=3, variant=variant, temperature=0.1)
    cosines, told = similarity(*student), similarity(*teacher)
    made = {}
    for way, (mine, theirs) in {"image": (cosines, told), "text": (cosines.T, told.T)}.items():
        found = hardest(theirs, mine, ids, 3)
        made[way] = found.pick(mine), found.pick(theirs) / 0.1, found.valid
    said = Lists(
        {way: m[0] for way, m in made.items()},
        {way: m[1] for way, m in made.items()},
        {way: m[2] for way, m in made.items()},
        ids,
        student,
    )
    assert dense.rank(said).item() == pytest.approx(dense(student, teacher, ids).item(), rel=1e-12)


def test_dcd_calibrates_cosines_and_leaves_logits():
    said = lists()
    plain, calibrated = (objectives.build("dcd", hardest=3, calibrate=c) for c in (False, True))
    assert calibrated.rank(said).item() == plain.rank(said).item()
    calibrated.rank(said).backward()
    assert calibrated.log_scale.grad is None
    dual = said._replace(features=rows(3))
    shifted = {way: s + 0.3 for way, s in dual.student.items()}
    value = calibrated.rank(dual)
    assert calibrated.rank(dual._replace(student=shifted)).item() == pytest.approx(value.item())
    value.backward()
    assert calibrated.log_scale.grad.abs() > 0


def test_dcd_of_one_direction_reads_one_list():
    said = lists()
    loss = objectives.build("dcd", hardest=3, directions="image")
    loss.rank(said).backward()
    assert said.student["image"].grad is not None
    assert said.student["text"].grad is None
    both = objectives.build("dcd", hardest=3).rank(said)
    other = objectives.build("dcd", hardest=3, directions="text").rank(said)
    assert both.item() == pytest.approx((loss.rank(said) + other).item() / 2)


def test_plain_weights_are_those_of_a_teacher_equally_unsure_of_all():
    said = lists()
    same = {way: torch.zeros(6, 5, dtype=torch.float64) for way in said.teacher}
    whole = {way: torch.ones_like(valid) for way, valid in said.valid.items()}
    said = said._replace(teacher=same, valid=whole)
    values = [
        objectives.build("dcd", hardest=3, variant=v).rank(said).item()
        for v in ("uncertainty", "plain")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_info_nce_over_lists_is_the_cross_entropy_of_the_true_partner():
    said = lists()
    flat = {way: torch.zeros(6, 5, dtype=torch.float64) for way in said.student}
    whole = {way: torch.ones_like(valid) for way, valid in said.valid.items()}
    loss = objectives.build("info_nce", hardest=4)
    assert loss.rank(said._replace(student=flat, valid=whole)).item() == pytest.approx(math.log(5))
    row = said.student["image"][1].detach()
    one = said._replace(student={"image": row[None]}, valid={"image": torch.ones(1, 5).bool()})
    assert loss.rank(one).item() == pytest.approx(-row.log_softmax(0)[0].item(), rel=1e-9)


def test_info_nce_of_a_dual_encoder_is_that_of_its_batch():
    own, ids = rows(4), torch.tensor([0, 1, 1, 2, 3, 4])
    said = lists(features=own)._replace(ids=ids)
    loss = objectives.build("info_nce")
    assert loss.rank(said).item() == loss(own, None, ids).item()


def test_cprd_ranks_hard_negatives_against_those_below_them():
    """Two valid hard negatives of one query, by hand: no features, so nothing else counts."""
    told = torch.tensor([[9.0, 3.0, 2.0, -4.0]], dtype=torch.float64)
    mine = torch.tensor([[5.0, 1.0, 0.5, 2.0]], dtype=torch.float64)
    said = Lists(
        {"image": mine},
        {"image": told},
        {"image": torch.ones(1, 4, dtype=torch.bool)},
        torch.tensor([0]),
        None,
    )
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(0.5) + math.exp(2)))
    second = -math.log(math.exp(0.5) / (math.exp(0.5) + math.exp(2)))
    loss = objectives.build("cprd", hardest=3, task_weight=0.0)
    assert loss.rank(said).item() == pytest.approx((first + second) / 2)
    every = objectives.build("cprd", hardest=3, task_weight=0.0, valid="all")
    assert every.rank(said).item() == pytest.approx((first + second) / 3)


def test_cprd_of_a_dual_encoder_also_beats_the_batchs_other_partners():
    own = rows(5, batch=2)
    told = torch.tensor([[9.0, 3.0, 2.0]] * 2, dtype=torch.float64)
    cosines = torch.tensor([[0.9, 0.1, 0.3], [0.8, -0.2, 0.0]], dtype=torch.float64)
    said = Lists(
        {"image": cosines},
        {"image": told},
        {"image": torch.ones(2, 3, dtype=torch.bool)},
        torch.tensor([0, 1]),
        own,
    )
    loss = objectives.build("cprd", hardest=2, task_weight=0.0, temperature=0.5)
    easy = similarity(*own) / 0.5
    expected = 0.0
    for row in range(2):
        hard, lower = cosines[row, 1] / 0.5, [cosines[row, 2] / 0.5, easy[row, 1 - row]]
        rest = sum(math.exp(s) for s in lower)
        expected -= math.log(math.exp(hard) / (math.exp(hard) + rest)) / 2
    assert loss.rank(said).item() == pytest.approx(expected)
