import pytest
import torch
from torch.nn.functional import normalize

from crosstill.evaluate.agreement import agreement
from crosstill.types import Features

NOTHING = torch.empty(0, 4)


def random_rows(photos: int, texts: int, width: int = 4, seed: int = 0) -> Features:
    draw = torch.Generator().manual_seed(seed)
    both = (torch.randn(n, width, generator=draw) for n in (photos, texts))
    return Features(*(normalize(rows, dim=1) for rows in both))


def best(queries: torch.Tensor, candidates: torch.Tensor, alone: bool) -> list[set[int]]:
    """The ten best of each query, one by one."""
    found = []
    for row, query in enumerate(queries):
        order = (candidates @ query).argsort(descending=True).tolist()
        found.append({*[other for other in order if not (alone and other == row)][:10]})
    return found


def test_the_teacher_agrees_with_itself_and_turned_rows_with_both():
    teacher = random_rows(700, 90)
    found = agreement(teacher, teacher)
    assert found.value == 100 and found.overlap == {"text→image": 100, "image→text": 100}
    assert [recall.r1 for recall in found.own.values()] == [100, 100]
    axes = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    turned = agreement(Features(*(rows @ axes for rows in teacher)), teacher)
    assert turned.value > 99.9  # rankings are the same, rows are not
    assert turned.own["image"].r1 < 50


def test_the_overlap_is_that_of_ten_best_counted_one_by_one():
    student, teacher = random_rows(600, 40, seed=1), random_rows(600, 40)
    found = agreement(student, teacher)
    for way, query, target in (("text→image", 1, 0), ("image→text", 0, 1)):
        ours, theirs = (best(x[query], x[target], alone=False) for x in (student, teacher))
        common = [len(a & b) for a, b in zip(ours, theirs, strict=True)]
        assert found.overlap[way] == pytest.approx(10 * sum(common) / len(common))
    assert found.value == pytest.approx(sum(found.overlap.values()) / 2)


def test_of_one_side_the_nearest_others_are_compared():
    student, teacher = random_rows(600, 0, seed=1), random_rows(600, 0)
    found = agreement(student, Features(teacher.image, torch.empty(0)))
    ours, theirs = (best(x.image, x.image, alone=True) for x in (student, teacher))
    common = [len(a & b) for a, b in zip(ours, theirs, strict=True)]
    assert found.overlap == {"image→image": pytest.approx(10 * sum(common) / 600)}
    assert found.own.keys() == {"image"} and (found.images, found.captions) == (600, 0)
    assert found.heads == ("own image R@1", "R@5", "R@10", "image→image overlap", found.name)
    assert len(found.figures) == len(found.heads) and found.figures[-1] == found.value


def test_rows_that_are_all_alike_agree_as_chance_has_it():
    teacher = random_rows(1000, 1000)
    alike = Features(*(torch.ones_like(rows) for rows in teacher))
    assert agreement(alike, teacher).value < 3


def test_so_few_rows_that_anybody_agrees_are_named():
    found = agreement(random_rows(9, 40, seed=1), random_rows(9, 40))
    assert found.overlap["text→image"] == 100
    assert found.warning == "only 9 photos: any student's ten best are the teacher's"
    assert agreement(random_rows(11, 11), random_rows(11, 11)).warning is None
