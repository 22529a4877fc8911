"""Caches of several teachers as one: closed forms, what is refused, what a kill leaves."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosstill import cache as caches
from crosstill.cache import Cache, build, join, joined
from crosstill.errors import ConfigError, CorruptError, MismatchError
from crosstill.fusion.scores import ScoreCache, build_scores
from support import SmallJudge, SmallTeacher, flip, matrix
from verbs import crosstill, refusal

HALF, SINGLE = 2e-3, 1e-6  # of a cosine, by how rows are stored


class Named(SmallTeacher):
    """A teacher of another name, width and licence."""

    def __init__(self, name: str, licence: str | None = "mit", **options) -> None:
        super().__init__(**options)
        self.name, self.licence = name, licence


@pytest.fixture(scope="module")
def pairs(scenes):
    return scenes


@pytest.fixture(scope="module")
def two(pairs, tmp_path_factory) -> tuple[Cache, Cache]:
    """What two teachers say, 16 and 24 wide, in full precision."""
    folder = tmp_path_factory.mktemp("two")
    second = Named("models/second.1", dim=24, weights=3)
    return (
        build(SmallTeacher(), pairs, folder / "a", dtype="fp32"),
        build(second, pairs, folder / "b", dtype="fp32"),
    )


def rows(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        cache.image_features(np.arange(len(cache.image_ids))),
        cache.text_features(np.arange(len(cache.texts))),
    )


def cosines(cache: Cache) -> torch.Tensor:
    image, text = (torch.nn.functional.normalize(side, dim=1) for side in rows(cache))
    return image @ text.T


def test_a_row_of_two_teachers_is_what_the_formula_says(two, tmp_path):
    made = join(two, tmp_path / "c", [3, 1])
    for mine, first, second in zip(*map(rows, (made, *two)), strict=True):
        expected = torch.cat([first * 0.75**0.5, second * 0.5], dim=1)
        torch.testing.assert_close(mine, expected, atol=SINGLE, rtol=0)
        torch.testing.assert_close(mine.norm(dim=1), torch.ones(len(mine)))


@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ([1, 0.25], (0.8, 0.2))])
def test_cosines_are_the_weighted_means_of_the_teachers(two, tmp_path, weights, shares):
    made = join(two, tmp_path / "c", weights)
    expected = sum(share * cosines(one) for share, one in zip(shares, two, strict=True))
    torch.testing.assert_close(cosines(made), expected, atol=SINGLE, rtol=0)
    assert [part.share for part in joined.parts(made)] == pytest.approx(shares)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", SINGLE), ("fp16", HALF)])
def test_slices_are_each_teachers_own_rows(pairs, two, tmp_path, dtype, bound):
    again = build(SmallTeacher(), pairs, tmp_path / "a", dtype=dtype)
    second = build(Named("b", dim=24, weights=3), pairs, tmp_path / "b", dtype=dtype)
    made = join([again, second], tmp_path / "c", [1, 0.1])
    assert made.header["key"]["dtype"] == dtype
    for part, one in zip(joined.parts(made), two, strict=True):
        for mine, theirs in zip(rows(made), rows(one), strict=True):
            own = torch.nn.functional.normalize(mine[:, part.columns], dim=1)
            torch.testing.assert_close(own, theirs, atol=bound, rtol=0)


def test_one_cache_joined_has_the_same_cosines(two, tmp_path):
    made = join([two[1].folder], tmp_path / "c", [0.3])
    torch.testing.assert_close(cosines(made), cosines(two[1]), atol=SINGLE, rtol=0)
    assert made.dim == 24 and [part.share for part in joined.parts(made)] == [1]


def test_every_view_stands_beside_the_same_view(pairs, tmp_path):
    one = build(SmallTeacher(), pairs, tmp_path / "a", views=3, dtype="fp32")
    other = build(SmallTeacher(weights=1), pairs, tmp_path / "b", views=3, dtype="fp32")
    made = join([one, other], tmp_path / "c")
    images, view = np.array([5, 5, 40]), np.array([0, 2, 1])
    expected = [c.image_features(images, view) * 0.5**0.5 for c in (one, other)]
    torch.testing.assert_close(made.image_features(images, view), torch.cat(expected, 1))
    # which part of a photo a view is stays with it
    assert made.views == 3 and made.view(40, 1) == one.view(40, 1) != one.view(40, 2)
    assert set(made.header["files"]) == set(one.header["files"])


def test_the_header_tells_of_every_part(two, tmp_path):
    made = join(two, tmp_path / "c", [1, 0.5])
    assert made.teacher["name"] == "small + second.1" and made.dim == made.teacher["dim"] == 40
    assert made.teacher["parameters"] == sum(one.teacher["parameters"] for one in two)
    assert made.teacher["licence"] == "apache-2.0 and mit"
    for part, one, weight in zip(made.teacher["parts"], two, (1, 0.5), strict=True):
        assert part["weight"] == weight
        for name in ("name", "dim", "licence", "identity", "source", "parameters"):
            assert part[name] == one.teacher[name]
    assert [part.name for part in joined.parts(made)] == ["small", "second-1"]
    assert joined.parts(two[0]) == ()


def test_teachers_of_one_name_are_told_apart(two, tmp_path):
    again = [shutil.copytree(two[0].folder, tmp_path / name) for name in "ab"]
    parts = joined.parts(join([two[0], *again], tmp_path / "c"))
    assert [part.name for part in parts] == ["small", "small-2", "small-3"]
    assert [part.columns.start for part in parts] == [0, 16, 32]


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("cc-by-nc-4.0", None), "cc-by-nc-4.0 and not known"),
        ((None, None), None),
    ],
)
def test_an_unknown_licence_is_not_hidden_by_a_known_one(pairs, tmp_path, licences, expected):
    made = [build(Named("t", word), pairs, tmp_path / str(i)) for i, word in enumerate(licences)]
    assert join(made, tmp_path / "c").teacher["licence"] == expected


def test_identity_follows_teachers_and_weights(pairs, two, tmp_path):
    other = build(SmallTeacher(weights=9), pairs, tmp_path / "other")
    ways = [(two, None), (two, [1, 2]), (two[::-1], None), ((two[0], other), None)]
    made = [join(way, tmp_path / str(i), weights) for i, (way, weights) in enumerate(ways)]
    assert len({cache.digest for cache in made}) == len(ways)
    assert join(two, tmp_path / "again").digest == made[0].digest


def test_only_the_sides_that_all_have_are_joined(pairs, two, tmp_path, caplog):
    vectors = tmp_path / "vectors"
    vectors.mkdir()
    random = np.random.default_rng(0)
    np.save(vectors / "image.npy", random.normal(size=(len(pairs), 8)).astype(np.float32))
    (vectors / "filenames.txt").write_text("\n".join(e.path for e in pairs.examples))
    from crosstill import teachers

    photos = build(teachers.load(str(vectors)), pairs, tmp_path / "photos")
    with caplog.at_level("INFO"):
        made = join([two[0], photos], tmp_path / "c")
    assert made.modalities == {"image"} and made.dim == 24
    assert f"{two[0].folder}: its text features are left out" in caplog.text
    again = shutil.copytree(photos.folder, tmp_path / "again")
    alone = join([photos, again], tmp_path / "d")
    assert alone.modalities == {"image"}
    assert alone.teacher["parameters"] is None


# --- finished, unfinished, damaged ---


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("commits", matrix([0, 1, 5, 9], [5]))
def test_a_join_that_was_stopped_ends_with_the_same_bytes(two, tmp_path, monkeypatch, commits):
    monkeypatch.setattr(sys.modules["crosstill.cache.cache_builder"], "SHARD_ROWS", 32)
    whole = contents(join(two, tmp_path / "whole").folder)
    commit, left = caches.cache_builder.Journal.commit, commits

    def dying(self, *arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        commit(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(caches.cache_builder.Journal, "commit", dying)
        join(two, tmp_path / "cut")
    left = 1000
    assert contents(join(two, tmp_path / "cut").folder) == whole
    assert len([name for name in whole if name.endswith(".npy")]) == 12


def test_a_finished_join_is_found_and_not_made_again(two, tmp_path):
    first = join(two, tmp_path / "c").folder
    times = {path.name: path.stat().st_mtime_ns for path in first.glob("*.npy")}
    join(two, first)
    assert {path.name: path.stat().st_mtime_ns for path in first.glob("*.npy")} == times


def test_another_join_or_build_in_its_folder_is_refused_by_name(pairs, two, tmp_path):
    made = join(two, tmp_path / "c")
    with pytest.raises(MismatchError, match=r"another teacher \(the teacher's parts differ\)"):
        join(two, made.folder, [1, 2])
    with pytest.raises(MismatchError, match="another teacher"):
        build(SmallTeacher(), pairs, made.folder)
    with pytest.raises(MismatchError, match="another.* teacher"):
        join(two, two[0].folder)
    with pytest.raises(ConfigError, match="holds notes.txt and no cache"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/notes.txt").touch()
        join(two, tmp_path / "mine")


@pytest.mark.parametrize("seed", range(5))
def test_a_turned_bit_is_seen(two, tmp_path, seed):
    folder = join(two, tmp_path / "c").folder
    choose = np.random.default_rng(seed)
    paths = sorted(folder.glob("*.npy"))
    path = paths[int(choose.integers(len(paths)))]
    path.write_bytes(flip(path.read_bytes(), choose))
    with pytest.raises(CorruptError, match=path.name):
        Cache(folder)


# --- what does not go together ---


def other_captions(pairs):
    first, *rest = pairs.examples
    return replace(pairs, examples=(replace(first, captions=("another",)), *rest))


def other_split(pairs):
    first, *rest = pairs.examples
    split = "val" if first.split == "train" else "train"
    return replace(pairs, examples=(replace(first, split=split), *rest))


def fewer(pairs):
    return replace(pairs, examples=pairs.examples[3:])


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (fewer, {}, "another dataset than .*: 3 of their images are in one alone, 0000"),
        (other_captions, {}, "1 of their images have other captions"),
        (other_split, {}, "1 of their images are of other splits"),
        (None, {"views": 2}, "has views = 2 and .* has 1; teachers are joined on the same views"),
        (None, {"seed": 4}, "has seed = 4 and .* has 0; teachers are joined on the same views"),
    ],
)
def test_caches_that_do_not_go_together_are_refused(pairs, two, tmp_path, change, options, said):
    asked = change(pairs) if change else pairs
    other = build(SmallTeacher(weights=1), asked, tmp_path / "o", dtype="fp32", **options)
    with pytest.raises(MismatchError, match=said) as caught:
        join([two[0], other], tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_the_order_and_place_of_the_photos_do_not_matter(pairs, two, tmp_path):
    shuffled = replace(pairs, examples=pairs.examples[::-1])
    other = build(SmallTeacher(weights=1), shuffled, tmp_path / "o", dtype="fp32")
    assert join([two[0], other], tmp_path / "c").dim == 32


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1], "weights: 1 for 2 caches; give one for each"),
        ([1, 0], "weights: 0 is not above 0"),
        ([1, -1], "weights: -1 is not above 0"),
        ([1, float("nan")], "weights: nan is not above 0"),
        ([float("inf"), 1], "weights: inf is not above 0"),
    ],
)
def test_wrong_weights_are_refused(two, tmp_path, weights, said):
    with pytest.raises(ConfigError, match=said):
        join(two, tmp_path / "c", weights)
    with pytest.raises(ConfigError, match="at least one cache"):
        join([], tmp_path / "c")


# --- the verb ---


def test_the_verb_joins_and_verifies(two, tmp_path):
    out = tmp_path / "c"
    folders = [one.folder for one in two]
    told = crosstill("join", *folders, "--weights", "1,0.5", "--out", out).stdout
    assert told == (
        f"{out}: 60 images, 300 captions, image and text features, 40 wide, of "
        "small (16 × 1), models/second.1 (24 × 0.5)\n"
    )
    assert "whole; 60 images" in crosstill("cache", "verify", out).stdout
    assert json.loads((out / "cache.json").read_text())["teacher"]["parts"][1]["weight"] == 0.5


def test_the_verb_refuses_in_one_line(pairs, two, tmp_path):
    folders, out = [one.folder for one in two], ["--out", tmp_path / "c"]
    assert "write numbers with commas" in refusal("join", *folders, "--weights", "one,two", *out)
    assert "1 for 2 caches" in refusal("join", *folders, "--weights", "1", *out)
    scores = build_scores(SmallJudge(), pairs, tmp_path / "scores")
    assert isinstance(scores, ScoreCache)
    assert "holds scores of pairs" in refusal("join", folders[0], scores.folder, *out)
    nothing = build(None, pairs, tmp_path / "nothing")
    assert "made without a teacher" in refusal("join", folders[0], nothing.folder, *out)
    assert "no finished cache there" in refusal("join", folders[0], tmp_path / "nowhere", *out)
    shutil.copytree(folders[0], tmp_path / "damaged")
    (tmp_path / "damaged/text-00000.npy").write_bytes(b"")
    crosstill("join", folders[0], tmp_path / "damaged", *out, code=1)


def test_a_cache_named_twice_is_refused(two, tmp_path):
    with pytest.raises(ConfigError, match="named twice.*weight of 2"):
        join([two[0], two[1], two[0].folder], tmp_path / "c")
