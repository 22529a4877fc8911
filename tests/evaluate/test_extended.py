"""ECCV Caption and CxC: closed forms, ties by brute force, and the published judge."""

import json
import warnings
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstill import data
from crosstill.data import scenes
from crosstill.errors import ConfigError, DataError
from crosstill.evaluate import extended
from crosstill.evaluate.extended import Extended, Queries, opened, place, rank, read
from crosstill.types import Example
from support import matrix, small_config
from verbs import crosstill, refusal


def queries(*true, missing=0):
    """One query for each list of true rows; `missing` more are true and not there."""
    width = max(map(len, true))
    items = torch.tensor([[*rows, *[-1] * (width - len(rows))] for rows in true])
    total = torch.tensor([len(rows) + missing for rows in true])
    return Queries(torch.arange(len(true)), items, total)


def ranked(true, scores, missing=0):
    table = torch.tensor([scores])
    return rank(queries(true, missing=missing), lambda rows: table[rows])


ORDER = [float(-place) for place in range(12)]  # row 0 first, row 11 last


@pytest.mark.parametrize(
    ("true", "map_at_r", "rprecision", "r1"),
    [
        ([0, 1, 2], 1, 1, 1),
        ([5, 6, 7], 0, 0, 0),
        ([1, 6], 0.25, 0.5, 0),
        ([0, 6], 0.5, 0.5, 1),
        ([0, 2, 9], (1 + 2 / 3) / 3, 2 / 3, 1),
        ([3], 0, 0, 0),
    ],
)
def test_closed_forms(true, map_at_r, rprecision, r1):
    found = ranked(true, ORDER)
    assert found.map_at_r == pytest.approx(100 * map_at_r, abs=1e-12)
    assert found.rprecision == pytest.approx(100 * rprecision, abs=1e-12)
    assert found.r1 == 100 * r1


def test_recall_at_five_and_ten():
    assert ranked([4], ORDER)[2:] == (0, 100, 100)
    assert ranked([9, 11], ORDER)[2:] == (0, 0, 100)
    assert ranked([10], ORDER)[2:] == (0, 0, 0)


def test_what_is_true_and_not_there_counts_as_missed():
    found = ranked([0, 1], ORDER, missing=2)
    assert found.map_at_r == pytest.approx(50)
    assert found.rprecision == pytest.approx(50)
    assert found.r1 == 100


def test_a_query_of_which_nothing_is_there():
    table = torch.tensor([ORDER])
    found = rank(
        Queries(torch.tensor([0]), torch.tensor([[-1]]), torch.tensor([3])), table.__getitem__
    )
    assert found == (0, 0, 0, 0, 0)


def test_a_collapsed_model_gets_what_chance_gives():
    found = ranked([0, 1, 2], [0.0] * 12)
    assert found.r1 == pytest.approx(100 * 3 / 12)
    assert found.rprecision == pytest.approx(100 * 3 / 12)


def of_order(order, true):
    hits, total = 0, 0.0
    for place_, row in enumerate(order[: len(true)], start=1):
        if row in true:
            hits += 1
            total += hits / place_
    return total / len(true), hits / len(true)


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    true=st.sets(st.integers(0, 5), min_size=1, max_size=5),
)
def test_ties_count_by_the_average_over_every_order_of_equals(scores, true):
    orders = {tuple(sorted(p, key=lambda i: -scores[i])) for p in permutations(range(6))}
    both = [of_order(order, true) for order in orders]
    found = ranked(sorted(true), [float(score) for score in scores])
    assert found.map_at_r == pytest.approx(100 * sum(a for a, _ in both) / len(both), abs=1e-9)
    assert found.rprecision == pytest.approx(100 * sum(b for _, b in both) / len(both), abs=1e-9)
    first = sum(order[0] in true for order in orders) / len(orders)
    assert found.r1 == pytest.approx(100 * first, abs=1e-9)


# --- the published judge, on its own ids ---


@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses ujson, and does without
        import eccv_caption

        return eccv_caption.Metrics(), Path(eccv_caption.__file__).parent / "data"


@pytest.fixture(scope="module")
def test_split(package):
    """COCO's 5,000 test images and 25,000 captions by their real ids, with words of our own."""
    _, folder = package
    listed = json.loads((folder / "original_image_to_caption.json").read_text())
    captions = {int(i): [(f"words {c}", int(c)) for c in ids] for i, ids in listed.items()}
    examples = [
        Example(str(i), f"val2014/COCO_val2014_{i:012d}.jpg", tuple(t for t, _ in texts), "test")
        for i, texts in captions.items()
    ]
    return captions, examples


def scores_of(rows, wide, draw, liked):
    """(Q, wide) whole numbers, no two of a row equal: random, and some true ones lifted."""
    prime = 25_013
    factor, shift = (torch.randint(1, prime, (len(rows), 1), generator=draw) for _ in range(2))
    scores = (torch.arange(1, wide + 1) * factor + shift) % prime
    lifted = torch.rand(liked.shape, generator=draw) < 0.6
    places = torch.where((liked >= 0) & lifted, liked, wide)
    more = torch.zeros(len(rows), wide + 1, dtype=torch.int64).scatter_(1, places, 1)[:, :wide]
    return (scores + prime * more * torch.randint(0, 2, (len(rows), 1), generator=draw)).float()


@pytest.mark.parametrize("rounds", matrix([2, 20], [2]))
@pytest.mark.parametrize("name", ["eccv", "cxc"])
def test_the_published_package_agrees(package, test_split, name, rounds, capsys):
    metrics, folder = package
    captions, examples = test_split
    truth = read(folder / f"{name}_caption_to_image.json")
    found = place(truth, captions, examples)
    assert found.name == name
    sides = {"i2t": (found.images, 25_000), "t2i": (found.captions, 5000)}
    images, texts = list(captions), [number for said in captions.values() for _, number in said]
    asked, answered = {"i2t": images, "t2i": texts}, {"i2t": texts, "t2i": images}
    draw = torch.Generator().manual_seed(0)
    some = torch.randperm(1200, generator=draw)[:100]
    for _ in range(rounds):
        for side, (whole, wide) in sides.items():
            few = Queries(*(part[some] for part in whole))
            scores = scores_of(few.rows, wide, draw, few.items)
            ours = rank(few, lambda rows, scores=scores: scores)
            best = scores.topk(50, dim=1).indices.tolist()
            target = {
                asked[side][row]: [answered[side][column] for column in columns]
                for row, columns in zip(few.rows.tolist(), best, strict=True)
            }
            judge(metrics, name, side, target, ours)
    capsys.readouterr()


def judge(metrics, name, side, target, ours):
    """Ask the package of these queries alone; a whole set takes it minutes."""
    whole = getattr(metrics, f"{name}_gts")
    setattr(metrics, f"{name}_gts", {side: {query: whole[side][query] for query in target}})
    try:
        for depth in (1, 5, 10):
            said = getattr(metrics, f"{name}_recalls")({side: target}, side, K=depth)
            assert getattr(ours, f"r{depth}") / 100 == pytest.approx(said[side], abs=1e-12)
        if name == "eccv":
            said = metrics.eccv_metrics({side: target}, side)
            assert ours.map_at_r / 100 == pytest.approx(said["eccv_map_at_r"][side], abs=1e-12)
            assert ours.rprecision / 100 == pytest.approx(said["eccv_rprecision"][side], abs=1e-12)
    finally:
        setattr(metrics, f"{name}_gts", whole)


def test_the_published_files_hold_what_the_paper_counts(package, test_split):
    _, folder = package
    captions, examples = test_split
    eccv = place(read(folder / "eccv_image_to_caption.json"), captions, examples)
    assert (len(eccv.images.rows), len(eccv.captions.rows)) == (1261, 1332)
    assert int(eccv.images.total.max()) == 48 and int(eccv.captions.total.max()) == 19
    assert (
        eccv.notes[0] == "eccv: 1,261 of 1,261 images and 1,332 of 1,332 captions are in this split"
    )
    # two of its caption ids are not in the test split; the package counts them too
    assert eccv.notes[1] == "eccv: 2 true candidates are not there and count as missed"
    cxc = place(read(folder / "cxc_image_to_caption.json"), captions, examples)
    assert float(cxc.images.total.double().mean()) == pytest.approx(7.117)
    assert len(cxc.notes) == 1


# --- files and ids ---

CXC = """caption,image,agg_score,sampling_method
COCO_val2014:sentid:11,COCO_val2014_000000000001.jpg,3.0,c2i_original
COCO_val2014:sentid:11,COCO_val2014_000000000002.jpg,2.99,c2i_intrasim
COCO_val2014:sentid:21,COCO_val2014_000000000001.jpg,4.5,c2i_intrasim
"""


def test_the_table_of_cxc_counts_a_rating_of_three(tmp_path):
    (tmp_path / "sits_test.csv").write_text(CXC)
    found = read(tmp_path / "sits_test.csv")
    assert found == Extended("sits_test", {1: {11, 21}}, {11: {1}, 21: {1}})


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("val2014/COCO_val2014_000000391895.jpg", 391895),
        ("000000391895.jpg", 391895),
        ("1000268201.jpg", None),
        ("1000000391895.jpg", None),
        ("000009.png", None),
    ],
)
def test_the_id_in_a_file_name(path, number):
    assert extended.image_id(path) == number


def test_captions_are_found_by_their_letters():
    known = {7: [("A dog runs . ", 1), ("A dog runs.", 2), ("A cat", 3)]}
    example = Example(
        "x", "COCO_val2014_000000000007.jpg", ("a cat", "A dog\truns", "new", "A dog runs"), "test"
    )
    found = extended.locate(known, [Example("y", "0.png", ("A cat",), "test"), example])
    assert found.images == {7: 1}
    assert found.captions == {3: 1, 1: 2, 2: 4}


def test_both_layouts_give_the_same_ids(tmp_path):
    karpathy = {"images": [{"cocoid": 5, "sentences": [{"raw": "one ", "sentid": 9}]}]}
    own = {"images": [], "annotations": [{"image_id": 5, "caption": "one", "id": 9}]}
    for name, value in (("k.json", karpathy), ("c.json", own)):
        (tmp_path / name).write_text(json.dumps(value))
        assert extended.read_captions(tmp_path / name) == {5: [("one", 9)]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sits.csv", "a,b\n1,2\n", "line 2: not CxC's columns caption, image, agg_score"),
        ("sits.csv", CXC.replace("4.5", "high"), "line 4: not CxC's columns"),
        ("sits.csv", CXC.replace("3.0", "1").replace("4.5", "2"), "no pair is rated 3 or more"),
        ("eccv.json", "{}", "whose name says image_to_caption or caption_to_image"),
        ("eccv_image_to_caption.json", "[1]", "not lists of ids by id"),
        ("eccv_image_to_caption.json", '{"1": []}', "not lists of ids by id"),
        ("eccv_image_to_caption.json", "{", "bad JSON .*download it again"),
        ("eccv_image_to_caption.json", '{"1": [2]}', "eccv_caption_to_image.json: cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read(tmp_path / name)


def test_annotations_without_ids_are_refused(tmp_path):
    (tmp_path / "sits_test.csv").write_text(CXC)
    (tmp_path / "flickr.json").write_text('{"images": [{"sentences": [{"raw": "a"}]}]}')
    with pytest.raises(DataError, match="no ids of COCO's captions in it"):
        opened([tmp_path / "sits_test.csv"], tmp_path / "flickr.json")
    with pytest.raises(ConfigError, match="give --annotations captions_val2014.json"):
        opened([tmp_path / "sits_test.csv"], Path("scenes:60"))


# --- the whole way, on scenes under COCO's names ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Sixty scenes named as COCO's photos, with made-up caption ids and two ground truths."""
    home = tmp_path_factory.mktemp("coco")
    path = scenes.write(home / "photos", 60)
    listed = json.loads(path.read_text())
    for number, item in enumerate(listed["images"], start=1):
        name = f"COCO_val2014_{number:012d}.png"
        (home / "photos" / item["filename"]).rename(home / "photos" / name)
        item |= {"filename": name, "cocoid": number}
        for place_, sentence in enumerate(item["sentences"]):
            sentence["sentid"] = 1000 * number + place_
    path.write_text(json.dumps(listed))
    test = [item for item in listed["images"] if item["split"] == "test"]
    images = {i["cocoid"]: [s["sentid"] for s in i["sentences"]] for i in test}
    # the first image also has the captions of the second
    first, second = sorted(images)[:2]
    images[first] = images[first] + images[second]
    captions: dict[int, list[int]] = {}
    for image, numbers in images.items():
        for number in numbers:
            captions.setdefault(number, []).append(image)
    for side, value in (("image_to_caption", images), ("caption_to_image", captions)):
        (home / f"made_{side}.json").write_text(json.dumps(value))
    rows = [
        f"COCO_val2014:sentid:{number},COCO_val2014_{image:012d}.jpg,5.0,c2i"
        for image, numbers in images.items()
        for number in numbers
    ]
    (home / "sits_test.csv").write_text("\n".join(["caption,image,agg_score,m", *rows]) + "\n")
    annotations = [
        {"image_id": i["cocoid"], "caption": s["raw"], "id": s["sentid"]}
        for i in listed["images"]
        for s in i["sentences"]
    ]
    (home / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    from crosstill import students

    texts = [text for example in data.open(path).examples for text in example.captions]
    students.build(small_config(), dim=16, captions=texts).save(home / "model")
    return home


def test_evaluate_prints_a_second_table(home):
    found = crosstill(
        *("evaluate", home / "model", home / "photos/dataset.json"),
        *("--truth", home / "made_image_to_caption.json", "--truth", home / "sits_test.csv"),
    )
    first, second = found.stdout.strip().split("\n\n")
    assert "RSUM" in first and "mAP@R" in second
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines()[2:]]
    assert [row[1] for row in rows] == ["made", "sits_test"]
    assert rows[0][2:] == rows[1][2:], "two files of one truth"
    assert "made: 6 of 6 images and 30 of 30 captions are in this split" in found.stderr


def test_annotations_may_come_from_another_file(home):
    truth = ("--truth", home / "made_caption_to_image.json", "--json")
    common = ("evaluate", home / "model", home / "photos/dataset.json", *truth)
    own = json.loads(crosstill(*common).stdout)
    other = json.loads(crosstill(*common, "--annotations", home / "captions_val2014.json").stdout)
    assert own == other
    assert set(own["truth"]) == {"made"}
    made = own["truth"]["made"]
    assert (made["images"], made["captions"]) == (6, 30)
    assert set(made["i2t"]) == {"map_at_r", "rprecision", "r1", "r5", "r10"}
    # with more that is true, no less is found
    assert all(made["t2i"][key] >= own["t2i"][key] - 1e-9 for key in ("r1", "r5", "r10"))


def test_another_split_is_refused_with_what_matched(home):
    line = refusal(
        *("evaluate", home / "model", home / "photos/dataset.json", "--split", "val"),
        *("--truth", home / "made_image_to_caption.json"),
    )
    assert "made: 0 of 6 images and 0 of 30 captions are in this split" in line
    assert "6 of 6 images have a COCO id in their names, 30 of 30 captions" in line
    assert line.endswith("give COCO's test split")


def test_another_dataset_is_refused_with_what_matched(home, tmp_path):
    scenes.write(tmp_path / "photos", 20)
    line = refusal(
        *("evaluate", home / "model", tmp_path / "photos/dataset.json"),
        *("--truth", home / "sits_test.csv"),
        *("--annotations", home / "captions_val2014.json"),
    )
    assert "(0 of 2 images have a COCO id in their names, 0 of 10 captions" in line


def test_truth_needs_annotations(home):
    line = refusal("evaluate", home / "model", "scenes:20", "--truth", home / "sits_test.csv")
    assert "give --annotations captions_val2014.json" in line
    line = refusal("evaluate", "m", "scenes:20", "--finder", "d", "--truth", home / "sits_test.csv")
    assert "leave them out" in line
