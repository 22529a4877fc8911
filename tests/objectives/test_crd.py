from math import exp, log, sqrt

import pytest
import torch
from placed import Operations
from torch.nn.functional import normalize

from crosstill import objectives
from crosstill.errors import ConfigError
from crosstill.objectives.crd import estimation
from crosstill.objectives.parts import Bank, draw
from crosstill.types import Features

KEYS = torch.tensor([70, 30, 90, 30, 50])  # four images, not in order, one named twice
OWNERS = [30, 50, 70, 90]
IDS = torch.tensor([70, 30, 70])
IMAGE_S = [[0.6, 0.8], [1.0, 0.0], [0.6, 0.8]]
TEXT_S = [[0.8, 0.6], [0.28, 0.96], [-0.6, 0.8]]
IMAGE_T = [[0.8, -0.6], [0.0, 1.0], [0.8, -0.6]]
TEXT_T = [[1.0, 0.0], [0.6, 0.8], [0.96, -0.28]]
BANK = [
    [[1.0, 0.0], [0.0, -1.0], [0.6, -0.8], [-0.28, 0.96]],
    [[0.0, 1.0], [0.8, 0.6], [-1.0, 0.0], [0.28, 0.96]],
]


def close(value: torch.Tensor, expected: object, atol: float = 1e-9) -> None:
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(value.double(), wanted, rtol=0, atol=atol)


def features(image: list[list[float]], text: list[list[float]]) -> Features:
    return Features(*(torch.tensor(x, dtype=torch.float64) for x in (image, text)))


STUDENT, TEACHER = features(IMAGE_S, TEXT_S), features(IMAGE_T, TEXT_T)


def build(**options: object) -> objectives.Objective:
    return objectives.build("crd", dim=2, keys=KEYS, **options)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("m", [1, 7, 16384])
def test_a_critic_that_knows_nothing_pays_ln2_a_choice(m):
    even = torch.zeros(3, m, dtype=torch.float64)
    value = estimation(even[:, 0], even, torch.zeros(3, m, dtype=torch.bool))
    close(value, [(m + 1) * log(2)] * 3, atol=1e-8)


def test_the_closed_form_of_the_paper_setting():
    assert 16385 * log(2) == pytest.approx(11357.2165534747, abs=1e-9)


def test_estimation_by_hand():
    # h+ = 3 m Pn; h- = m Pn / 3, m Pn and one that does not count: the others stand for three
    positives = torch.tensor([log(3)], dtype=torch.float64)
    negatives = torch.tensor([[-log(3), 0.0, 500.0]], dtype=torch.float64)
    absent = torch.tensor([[False, False, True]])
    close(estimation(positives, negatives, absent), [log(4 / 3) + 1.5 * (log(4 / 3) + log(2))])


def test_estimation_without_negatives_keeps_the_positive():
    positives = torch.tensor([log(3)], dtype=torch.float64)
    absent = torch.ones(1, 2, dtype=torch.bool)
    close(estimation(positives, torch.zeros(1, 2, dtype=torch.float64), absent), [log(4 / 3)])


@pytest.mark.parametrize("size", [1e2, 1e6])
def test_estimation_is_exact_for_a_critic_of_any_size(size):
    positives = torch.tensor([-size], dtype=torch.float64, requires_grad=True)
    negatives = torch.tensor([[size, -size]], dtype=torch.float64, requires_grad=True)
    value = estimation(positives, negatives, torch.zeros(1, 2, dtype=torch.bool))
    value.sum().backward()
    close(value, [2 * size])
    close(positives.grad, [-1.0])
    close(negatives.grad, [[1.0, 0.0]])


def z_by_hand(rows: list[list[float]], temperature: float) -> float:
    """I times the mean of exp over pairs of different images."""
    ids = IDS.tolist()
    found = [
        exp(dot(rows[i], rows[j]) / temperature)
        for i in range(3)
        for j in range(3)
        if ids[i] != ids[j]
    ]
    return len(OWNERS) * sum(found) / len(found)


def side_by_hand(side: int, z: float, drawn: list[int], temperature: float) -> float:
    ours, theirs = (IMAGE_S, TEXT_S)[side], (IMAGE_T, TEXT_T)[side]
    m, noise, total = len(drawn), len(drawn) / len(OWNERS), 0.0
    for i, owner in enumerate(IDS.tolist()):
        h = exp(dot(ours[i], theirs[i]) / temperature) / z
        total -= log(h / (h + noise))
        terms = []
        for row in drawn:
            if OWNERS[row] != owner:
                h = exp(dot(ours[i], BANK[side][row]) / temperature) / z
                terms.append(-log(noise / (h + noise)))
        total += m * sum(terms) / len(terms)
    return total / len(IDS)


def placed(**options: object) -> objectives.Objective:
    """A loss whose bank holds the numbers above, in float64."""
    loss = build(**options).double()
    loss.bank.entries.copy_(torch.tensor(BANK, dtype=torch.float64))
    return loss


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("z", [None, (7.0, 11.0)])
def test_loops_over_numbers_agree(m, temperature, z):
    loss = placed(negatives=m, temperature=temperature, seed=3)
    if z:
        loss.log_z.copy_(torch.tensor(z, dtype=torch.float64).log())
    z = z or [z_by_hand(rows, temperature) for rows in (IMAGE_T, TEXT_T)]
    drawn = draw(3, 0, m, len(OWNERS)).tolist()
    assert {OWNERS[row] for row in drawn} & set(IDS.tolist())  # some do not count
    by_hand = sum(side_by_hand(side, z[side], drawn, temperature) for side in (0, 1))
    close(loss(STUDENT, TEACHER, IDS), by_hand)


def test_update_fixes_the_constants_of_the_first_batch():
    loss = placed(temperature=0.5)
    first = [log(z_by_hand(rows, 0.5)) for rows in (IMAGE_T, TEXT_T)]
    loss.update(TEACHER, IDS)
    close(loss.log_z, first)
    loss.update(STUDENT, IDS)
    close(loss.log_z, first)
    assert loss.draws == 2


def test_a_batch_of_one_image_fixes_no_constants():
    loss = placed(negatives=6, temperature=0.5)
    same = torch.tensor([50, 50, 50])
    value = loss(STUDENT, TEACHER, same)
    loss.update(TEACHER, same)
    assert loss.log_z.isinf().all()
    # until then exp(0) of unrelated rows stands for the mean, so Z = I
    loss.draws.zero_()
    loss.bank.entries.copy_(torch.tensor(BANK, dtype=torch.float64))
    loss.log_z.fill_(log(4))
    close(loss(STUDENT, TEACHER, same), value.item())


def test_forward_changes_nothing():
    loss = build()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    values = [loss(STUDENT, TEACHER, IDS).item() for _ in range(2)]
    assert values[0] == values[1]
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_only_the_rows_of_the_batch_change():
    loss = placed()
    loss.update(TEACHER, IDS)
    unseen = [OWNERS.index(50), OWNERS.index(90)]
    close(loss.bank.entries[:, unseen], [[side[row] for row in unseen] for side in BANK])


def test_a_row_is_old_and_new_in_equal_parts_made_unit_again():
    loss = placed()
    loss.update(TEACHER, IDS)
    for side, rows in enumerate((IMAGE_T, TEXT_T)):
        # 30 occurs once, 70 twice: the mean of its rows counts
        for owner, new in (
            (30, rows[1]),
            (70, [(a + b) / 2 for a, b in zip(rows[0], rows[2], strict=True)]),
        ):
            old = BANK[side][OWNERS.index(owner)]
            mixed = [(a + b) / 2 for a, b in zip(old, new, strict=True)]
            length = sqrt(dot(mixed, mixed))
            close(loss.bank.entries[side, OWNERS.index(owner)], [x / length for x in mixed])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_is_what_stays(momentum):
    loss = placed(momentum=momentum)
    loss.update(TEACHER, IDS)
    mixed = [momentum * a + (1 - momentum) * b for a, b in zip(BANK[0][0], IMAGE_T[1], strict=True)]
    close(loss.bank.entries[0, 0], [x / sqrt(dot(mixed, mixed)) for x in mixed])


def test_each_step_draws_anew_and_alike_in_every_process():
    ours, other = build(seed=5), build(seed=5)
    seen = []
    for _ in range(3):
        torch.rand(1)  # the global generator has no say
        values = [x(STUDENT, TEACHER, IDS).item() for x in (ours, other)]
        assert values[0] == values[1]
        seen.append(values[0])
        for x in (ours, other):
            x.draws += 1
    assert len(set(seen)) == 3
    assert build(seed=6)(STUDENT, TEACHER, IDS).item() != seen[0]


def test_a_draw_depends_on_seed_and_step_and_hits_all_rows_evenly():
    counts = draw(0, 1, 40_000, 4).bincount(minlength=4)
    assert len(counts) == 4
    assert all(9_600 < count < 10_400 for count in counts.tolist())  # 4.6 deviations of 87
    draws = [draw(seed, step, 50, 1000) for seed in range(3) for step in range(3)]
    assert len({tuple(x.tolist()) for x in draws}) == 9
    assert torch.equal(draws[4], draw(1, 1, 50, 1000))


def test_a_bank_of_one_image_has_no_negatives():
    loss = objectives.build("crd", dim=2, keys=torch.tensor([7]), negatives=4, temperature=1.0)
    student = Features(*(x[:1].clone().requires_grad_() for x in STUDENT))
    value = loss(student, Features(*(x[:1] for x in TEACHER)), torch.tensor([7]))
    value.backward()
    # both positives have cosine 0 and .8; Z = 1 and m Pn = 4
    by_hand = [log(1 + 4 / exp(dot(s[0], t[0]))) for s, t in ((IMAGE_S, IMAGE_T), (TEXT_S, TEXT_T))]
    close(value, sum(by_hand), atol=1e-6)
    assert all(x.grad.isfinite().all() for x in student)


def test_the_bank_knows_its_images_by_key():
    bank = Bank(KEYS, 2, seed=0)
    assert bank.keys.tolist() == OWNERS
    assert bank.locate(torch.tensor([90, 30, 30, 70])).tolist() == [3, 0, 0, 2]
    close(bank.entries.norm(dim=-1), torch.ones(2, 4), atol=1e-6)
    assert bank.entries.dtype == torch.float32
    assert not torch.equal(bank.entries, Bank(KEYS, 2, seed=1).entries)


@pytest.mark.parametrize("strange", [-5, 29, 31, 91])
def test_an_image_that_the_bank_does_not_know_is_refused(strange):
    ids = torch.tensor([30, strange, 70])
    with pytest.raises(ConfigError, match=f"no row for image key {strange}; give the loss"):
        build()(STUDENT, TEACHER, ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"negatives": 0}, "negatives must be above 0"),
        ({"momentum": 1.0}, "momentum must be 0 or above and below 1"),
        ({"momentum": -0.1}, "momentum must be 0 or above and below 1"),
        ({"momentum": float("nan")}, "momentum must be 0 or above and below 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_a_bank_needs_images():
    with pytest.raises(ConfigError, match="needs the option 'keys'"):
        objectives.build("crd", dim=2)
    with pytest.raises(ConfigError, match="keys is empty; give"):
        objectives.build("crd", dim=2, keys=torch.empty(0, dtype=torch.int64))


def test_a_large_batch_takes_as_many_operations_as_a_small_one():
    counts = []
    for size in (4, 64):
        random = torch.Generator().manual_seed(0)
        rows = [normalize(torch.randn(size, 512, generator=random), dim=1) for _ in range(4)]
        student, ids = Features(*(x.requires_grad_() for x in rows[:2])), torch.arange(size)
        loss = objectives.build("crd", dim=512, keys=torch.arange(5000))
        with Operations() as operations:
            loss(student, Features(*rows[2:]), ids).backward()
            loss.update(Features(*rows[2:]), ids)
        counts.append(operations.count)
    assert counts[0] == counts[1]  # no loop over rows: 0.03 s on one thread of a Xeon at 2.8 GHz
