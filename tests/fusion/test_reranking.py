"""Two-stage retrieval, by what must hold for any finder and any judge."""

from dataclasses import replace

import pytest
import torch

from crosstill import images
from crosstill.errors import ConfigError
from crosstill.evaluate import embed
from crosstill.evaluate.recall import Retrieval, from_scores
from crosstill.fusion import rerank
from crosstill.fusion.measure import score_matrix
from evaluate.judges import SmallJudge, TableJudge, pictures
from support import SmallTeacher

IMAGES, CAPTIONS = 30, 4
ALL = IMAGES * CAPTIONS


@pytest.fixture(scope="module")
def pairs():
    return pictures(IMAGES, CAPTIONS)


@pytest.fixture(scope="module")
def owner() -> torch.Tensor:
    return torch.arange(IMAGES).repeat_interleave(CAPTIONS)


@pytest.fixture(scope="module")
def cosines(pairs) -> torch.Tensor:
    seen = embed(SmallTeacher(), pairs)
    found = seen.image @ seen.text.T
    assert len(found.unique()) == found.numel()  # no ties, so that all that follows is exact
    return found


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(IMAGES, ALL, generator=torch.Generator().manual_seed(seed))


def six(recall: Retrieval) -> tuple[float, ...]:
    return (*recall.i2t.fair, *recall.t2i.fair)


def stages(pairs, table, *depths):
    found = rerank(SmallTeacher(), TableJudge(pairs, table), pairs, depths)
    assert [stage.k for stage in found.stages] == sorted(set(depths))
    return found


def within(cosines, owner, k: int) -> tuple[float, float]:
    """How many queries have a true partner among the first k, in percent, both ways."""
    true = torch.nn.functional.one_hot(owner, IMAGES).T.bool()
    i2t = true.gather(1, cosines.topk(k, dim=1).indices).any(1).double().mean()
    t2i = true.gather(0, cosines.topk(k, dim=0).indices).any(0).double().mean()
    return 100 * float(i2t), 100 * float(t2i)


def test_the_first_row_is_the_finder_alone(pairs, cosines, owner):
    found = stages(pairs, noise(), 5)
    assert six(found.finder.recall) == six(from_scores(cosines, owner))
    assert found.finder.name == "small" and found.judge == "judge"


def test_one_candidate_cannot_be_put_in_another_order(pairs):
    found = stages(pairs, noise(), 1)
    assert six(found.stages[0].recall) == six(found.finder.recall)


@pytest.mark.parametrize("k", [ALL, ALL + 7])
def test_all_candidates_give_the_recall_of_the_full_matrix(pairs, owner, k):
    table = noise()
    (stage,) = stages(pairs, table, k).stages
    assert six(stage.recall) == six(from_scores(table, owner))
    assert stage.pairs == IMAGES * ALL


def test_all_candidates_of_a_true_model_give_its_full_recall():
    pairs, judge = pictures(12, 3), SmallJudge()
    (stage,) = rerank(SmallTeacher(), judge, pairs, [36]).stages
    full = score_matrix(SmallJudge(), pairs)
    assert six(stage.recall) == six(from_scores(full.scores, full.truth))


def test_recall_at_ten_of_ten_candidates_is_the_finders(pairs):
    found = stages(pairs, noise(), 10)
    (stage,) = found.stages
    assert stage.recall.i2t.r10 == found.finder.recall.i2t.r10
    assert stage.recall.t2i.r10 == found.finder.recall.t2i.r10
    assert six(stage.recall) != six(found.finder.recall)


def test_a_perfect_judge_finds_whatever_is_among_the_candidates(pairs, cosines, owner):
    truth = torch.nn.functional.one_hot(owner, IMAGES).T.float()
    for stage in stages(pairs, truth, 1, 3, 5, 10, 20).stages:
        expected = within(cosines, owner, stage.k)
        assert (stage.recall.i2t.r1, stage.recall.t2i.r1) == pytest.approx(expected, abs=1e-9)
    assert stage.recall.i2t.r1 > 30  # it says something


def test_a_judge_that_repeats_the_finder_changes_nothing(pairs, cosines):
    found = stages(pairs, cosines, 1, 5, 10, 50)
    for stage in found.stages:
        assert six(stage.recall) == six(found.finder.recall)


@pytest.mark.parametrize("k", [2, 7, 25])
def test_against_lists_that_are_sorted_one_by_one(pairs, cosines, owner, k):
    table = noise(3)
    (stage,) = stages(pairs, table, k).stages
    hits = torch.zeros(2, 3)
    sides = (cosines, table, lambda q, c: owner[c] == q), (cosines.T, table.T, None)
    for way, (near, judged, right) in enumerate(sides):
        right = right or (lambda q, c: owner[q] == c)
        for query in range(len(near)):
            order = sorted(range(near.shape[1]), key=lambda c: -near[query, c])
            head = sorted(order[:k], key=lambda c: -judged[query, c])
            true = [bool(right(query, c)) for c in head + order[k:]]
            hits[way] += torch.tensor([any(true[:depth]) for depth in (1, 5, 10)])
    hits *= torch.tensor([[100 / IMAGES], [100 / ALL]])
    assert six(stage.recall) == pytest.approx(tuple(hits.flatten().tolist()), abs=1e-4)


def test_the_judges_ties_are_broken_by_chance(pairs, cosines, owner):
    (stage,) = stages(pairs, torch.zeros(IMAGES, ALL), 5).stages
    _, t2i = within(cosines, owner, 5)
    assert stage.recall.t2i.r1 == pytest.approx(t2i / 5)  # one of five, none ahead of the others
    assert stage.recall.t2i.optimistic.r1 == pytest.approx(t2i)


def test_scores_of_any_size_keep_their_order(pairs):
    ranks = noise().flatten().argsort().argsort().reshape(IMAGES, ALL).float()
    plain = [six(stage.recall) for stage in stages(pairs, ranks, 3, 20).stages]
    # neighbours as near as float32 can tell, where an offset would make them one
    for other in (1e4 + ranks * 2**-10, ranks * 2**-23 - 1, ranks * 1e-30):
        assert len(other.unique()) == other.numel()
        assert [six(stage.recall) for stage in stages(pairs, other, 3, 20).stages] == plain


def test_a_collapsed_finder_costs_no_more_and_finds_by_chance(pairs):
    finder = SmallTeacher()
    finder.embed_images = lambda pixels: torch.ones(len(pixels), 1)
    finder.embed_texts = lambda texts: torch.ones(len(texts), 1)
    finder.dim = 1
    (stage,) = rerank(finder, SmallJudge(), pairs, [1]).stages
    assert stage.pairs == IMAGES + ALL - 1
    assert stage.recall.t2i.r1 == pytest.approx(100 / IMAGES)


def test_pairs_are_the_union_of_both_directions_and_scored_once(pairs, cosines):
    judge = TableJudge(pairs, noise())
    calls = []
    judge.score_pairs = lambda i, t, rows: (
        calls.append((i.hidden[rows[:, 0], 0], t.hidden[rows[:, 1], 0]))
        or TableJudge.score_pairs(judge, i, t, rows)
    )
    found = rerank(SmallTeacher(), judge, pairs, [1, 5, 10])
    scored = [pair for i, t in calls for pair in zip(i.tolist(), t.tolist(), strict=True)]
    assert len(scored) == len(set(scored)) == found.stages[-1].pairs
    for stage in found.stages:
        union = torch.zeros(IMAGES, ALL, dtype=torch.bool)
        union.scatter_(1, cosines.topk(stage.k, dim=1).indices, True)
        union.scatter_(0, cosines.topk(stage.k, dim=0).indices, True)
        assert stage.pairs == int(union.sum())


def test_seconds_and_passes_grow_with_k(pairs):
    found = stages(pairs, noise(), 1, 10, 20)
    seconds = [found.seconds, *(stage.seconds for stage in found.stages)]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]
    assert [stage.estimated for stage in found.stages] == [True, True, False]


def test_the_table_and_the_json(pairs):
    found = stages(pairs, noise(), 1, 5)
    head, _, *rows = found.table().splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "k",
        "image→text R@1",
        "R@5",
        "R@10",
        "text→image R@1",
        "R@5",
        "R@10",
        "RSUM",
        "passes",
        "seconds",
    ]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == ["0", "1", "5"]
    encoded = IMAGES + ALL
    passes = [encoded, *(encoded + stage.pairs for stage in found.stages)]
    assert [row[8] for row in cells] == [f"{count:,}" for count in passes]
    assert [row[9].startswith("≈") for row in cells] == [False, True, False]
    assert any(note.startswith("≈") for note in found.notes)
    values = found.to_json()
    assert values["finder"]["rsum"] == found.finder.recall.rsum and values["judge"] == "judge"
    assert [stage["k"] for stage in values["stages"]] == [1, 5]
    assert values["stages"][0]["estimated"] is True
    assert values["stages"][1]["rsum"] == found.stages[1].recall.rsum


def test_images_that_one_of_the_two_cannot_read_are_left_out_for_both():
    base = pictures(6, 2)
    judge = SmallJudge()
    # as long as the judge takes crops of it, this one has too many pixels
    judge.preprocess = images.Preprocess(size=(8, 8), resize="crop")
    wide = b"P6\n60000 2\n255\n" + b"\0" * 360_000
    pairs = replace(base, read=lambda e: wide if e.path == "3.png" else base.read(e))
    found = rerank(SmallTeacher(), judge, pairs, [2])
    assert [row["path"] for row in found.quarantine.rows] == ["3.png"]
    assert found.finder.recall.images == 5 and found.stages[0].recall.captions == 10
    assert any("3.png" in note for note in found.notes)


@pytest.mark.parametrize("depths", [[], [0, 5], [-1]])
def test_depths_below_one(pairs, depths):
    with pytest.raises(ConfigError, match="at least 1"):
        rerank(SmallTeacher(), SmallJudge(), pairs, depths)


def test_a_blend_adds_the_finders_cosine_to_the_judges_score(pairs, cosines, owner):
    silent = rerank(SmallTeacher(), TableJudge(pairs, torch.zeros_like(cosines)), pairs, [ALL], 0.1)
    assert silent.stages[0].recall == from_scores(cosines, owner)
    table = torch.randn(cosines.shape, generator=torch.Generator().manual_seed(3))
    both = rerank(SmallTeacher(), TableJudge(pairs, table), pairs, [ALL], 0.5)
    assert both.stages[0].recall.rsum == pytest.approx(
        from_scores(table + cosines / 0.5, owner).rsum
    )
    assert both.to_json()["blend"] == 0.5 and "cosine / 0.5" in " ".join(both.notes)
    with pytest.raises(ConfigError, match="--blend 0"):
        rerank(SmallTeacher(), TableJudge(pairs, table), pairs, [1], 0.0)
