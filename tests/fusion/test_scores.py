"""The score cache: what a fusion teacher said of which pairs, whole or refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosstill import cache, data, images, students, teachers
from crosstill.cache import Cache, build, build_features, memo
from crosstill.data import scenes as scenery
from crosstill.errors import (
    ConfigError,
    CorruptError,
    DataError,
    ImageError,
    InputError,
    LockedError,
    MismatchError,
    ModelError,
)
from crosstill.files import locked
from crosstill.fusion.scores import ScoreCache, build_scores
from evaluate.judges import small_meter, texts_of
from support import SmallJudge, SmallTeacher, cut, flip, matrix, small_config

FEW = {"false": 6, "false_images": 3}


@pytest.fixture(scope="module", autouse=True)
def short_shards():
    """Thirty scenes make four shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crosstill.fusion.scores.SHARD_IMAGES", 8)
        patch.setattr("crosstill.fusion.scores.CALL", 50)
        yield


@pytest.fixture(scope="module")
def thirty(scenes):
    """Of the scenes, 24 to train on, 3 and 3; every third has a caption that others have too."""
    examples = scenes.examples[:30]
    also = [replace(e, captions=(*e.captions, "A scene.")) for e in examples[::3]]
    held = {e.path: scenes.read(e) for e in examples}  # rendering them each time would be slow
    every = (*also, *examples[1::3], *examples[2::3])
    return replace(scenes, examples=every, read=lambda example: held[example.path])


@pytest.fixture(scope="module")
def scored(thirty, tmp_path_factory) -> ScoreCache:
    return build_scores(SmallJudge(), thirty, tmp_path_factory.mktemp("scores") / "c", **FEW)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != ".lock"
    }


# --- what is in it ---


def test_every_score_is_what_the_teacher_says_of_that_pair(thirty, tmp_path):
    some = replace(thirty, examples=thirty.examples[::-1][:27])
    found = build_scores(SmallJudge(), some, tmp_path / "c", **FEW)
    by_id = {example.image_id: example for example in some.examples}
    assert len(found.image_ids) == 27 and len(found.scores) == len(found.pair_captions)
    for image, key in enumerate(found.image_ids):
        pixels = images.load(some.read(by_id[key]), "", images.Preprocess(size=(8, 8)))
        mine = slice(found.indptr[image], found.indptr[image + 1])
        texts = [found.texts[c] for c in found.pair_captions[mine]]
        expected = SmallJudge().score([pixels] * len(texts), texts)
        torch.testing.assert_close(found.scores[mine], expected)
        own = {found.texts[c] for c in np.flatnonzero(found.owner == image)}
        assert own == set(by_id[key].captions)


def test_rows_and_columns_tell_the_same(scored):
    pairs = {}
    for image in range(len(scored.image_ids)):
        captions, scores = scored.of_image(image)
        assert (np.diff(captions) > 0).all()
        pairs |= {(image, int(c)): float(s) for c, s in zip(captions, scores, strict=True)}
    columns = {}
    for caption in range(len(scored.texts)):
        rows, scores = scored.of_caption(caption)
        assert (np.diff(rows) > 0).all()
        columns |= {(int(i), caption): float(s) for i, s in zip(rows, scores, strict=True)}
    assert pairs == columns
    assert len(pairs) + len(scored.texts) == len(scored.scores)
    assert all(scored.owner[caption] != image for image, caption in pairs)


def test_true_scores_are_those_of_each_caption_with_its_image(scored):
    pairs = zip(scored.pair_images.tolist(), scored.pair_captions.tolist(), strict=True)
    place = {pair: number for number, pair in enumerate(pairs)}
    places = [place[image, caption] for caption, image in enumerate(scored.owner.tolist())]
    assert scored.true_scores.tolist() == scored.scores[places].tolist()


def test_no_false_caption_says_what_a_true_one_does(scored):
    own = [set() for _ in scored.image_ids]
    for caption, image in enumerate(scored.owner):
        own[image].add(scored.texts[caption])
    assert len(set(scored.texts)) < len(scored.texts)
    for image, texts in enumerate(own):
        assert not texts & {scored.texts[c] for c in scored.of_image(image)[0]}


def test_the_fewest_of_a_split(scored):
    assert set(scored.splits) == {"train", "val", "test"}
    for split, least in (("train", (6, 3)), ("val", (6, 2))):  # in val there are only two others
        rows = scored.split(split)
        captions = min(len(scored.of_image(image)[0]) for image in rows.images)
        found = min(len(scored.of_caption(caption)[0]) for caption in rows.captions)
        assert scored.least_false(split) == (captions, found)
        assert captions >= least[0] and found >= least[1]


def test_it_is_a_listing_like_the_other_cache(thirty, scored, tmp_path):
    plain = build(None, thirty, tmp_path / "plain")
    assert scored.image_ids == plain.image_ids and scored.texts == plain.texts
    assert (scored.keys == plain.keys).all() and scored.views == 1 and scored.dim is None
    assert scored.modalities == frozenset() and scored.teacher["kind"] == "fusion"
    assert scored.header["data"]["name"] == "scenes:60:0"
    split = scored.split("val")
    store = cache.pixels(scored, split, images.Preprocess(size=(8, 8)))
    assert len(store) == 3
    assert torch.equal(memo.memoised_tensor(scored, "x", lambda: torch.ones(2)), torch.ones(2))


def test_without_a_teacher_there_are_pairs_and_no_scores(thirty, scored, tmp_path):
    bare = build_scores(None, thirty, tmp_path / "c", **FEW)
    assert bare.scores is None and bare.true_scores is None
    assert (bare.pair_captions == scored.pair_captions).all()
    captions, scores = bare.of_image(3)
    assert len(captions) >= 6 and scores is None
    assert bare.teacher["name"] is None and not list((tmp_path / "c").glob("score-*"))


def test_open_knows_both_kinds(scored, cached, tmp_path):
    assert isinstance(cache.open(scored.folder), ScoreCache)
    assert isinstance(cache.open(cached.folder), Cache)
    with pytest.raises(InputError, match="no finished cache there"):
        cache.open(tmp_path)
    with pytest.raises(MismatchError, match="holds scores of pairs, and a teacher's features"):
        Cache(scored.folder)
    with pytest.raises(MismatchError, match="holds a teacher's features, and scores of pairs"):
        ScoreCache(cached.folder)


# --- finders ---


def captions_of(listing) -> list[tuple[str, str]]:
    pairs = zip(listing.owner, listing.texts, strict=True)
    return [(listing.image_ids[image], text) for image, text in pairs]


def test_a_cache_finds_its_highest_cosines_by_id(thirty, tmp_path):
    near = build(SmallTeacher(), thirty, tmp_path / "near", dtype="fp32")
    some = replace(thirty, examples=thirty.examples[10:])
    found = build_scores(None, some, tmp_path / "c", false=4, false_images=0, find=near)
    rows = [near.image_ids.index(key) for key in found.image_ids]
    cosine = (
        near.image_features(np.array(rows)) @ near.text_features(np.arange(len(near.texts))).T
    ).numpy()
    column = {pair: place for place, pair in enumerate(captions_of(near))}
    at = np.array([column[pair] for pair in captions_of(found)])
    train = found.split("train")
    for image in train.images:
        own = {found.texts[c] for c in np.flatnonzero(found.owner == image)}
        others = [c for c in train.captions if found.texts[c] not in own]
        worst = cosine[image, at[found.of_image(image)[0]]].min()
        better = sum(cosine[image, at[c]] > worst + 1e-6 for c in others)
        assert better < 4 and len(found.of_image(image)[0]) == 4


def test_a_model_finds_what_its_cache_does(thirty, tmp_path):
    near = build(SmallTeacher(), thirty, tmp_path / "near", dtype="fp32")
    by_cache = build_scores(None, thirty, tmp_path / "a", **FEW, find=near)
    by_model = build_scores(None, thirty, tmp_path / "b", **FEW, find=SmallTeacher())
    assert (by_cache.pair_captions == by_model.pair_captions).all()
    assert by_cache.digest != by_model.digest


def test_finders_that_cannot_find(thirty, tmp_path):
    def refuse(find, match, error=ConfigError):
        with pytest.raises(error, match=match):
            build_scores(None, thirty, tmp_path / "c", find=find)
        assert not (tmp_path / "c").exists()

    refuse("rndom", "no candidate finder named 'rndom'; did you mean 'random'")
    refuse(SmallJudge(), "find = judge: cannot find candidates")
    refuse(build(None, thirty, tmp_path / "none"), "has no features")
    eyes = SmallTeacher()
    eyes.modalities = frozenset({"image"})
    refuse(eyes, "find = small: has image features")
    fewer = replace(thirty, examples=thirty.examples[1:])
    other = build(SmallTeacher(), fewer, tmp_path / "other")
    refuse(other, "other: a cache of other data", MismatchError)


def test_a_finder_with_other_captions(thirty, tmp_path):
    first, *rest = thirty.examples
    changed = replace(thirty, examples=(replace(first, captions=("another",)), *rest))
    other = build(SmallTeacher(), changed, tmp_path / "other")
    with pytest.raises(MismatchError, match=f"other data, {first.path} with its captions"):
        build_scores(None, thirty, tmp_path / "c", find=other)


# --- kills, damage and wrong folders ---


@pytest.mark.parametrize("limit", matrix(range(0, 13, 2), [4]))
def test_a_build_that_was_stopped_ends_with_the_same_bytes(thirty, scored, tmp_path, limit):
    judge = SmallJudge(limit=limit)
    with pytest.raises(KeyboardInterrupt):
        build_scores(judge, thirty, tmp_path / "cut", **FEW)
    shuffled = replace(thirty, examples=thirty.examples[::-1])
    build_scores(SmallJudge(), shuffled, tmp_path / "cut", **FEW)
    whole = contents(scored.folder)
    assert len([name for name in whole if name.startswith("score-")]) == 4
    assert contents(tmp_path / "cut") == whole


def test_a_resumed_build_asks_only_what_is_left(thirty, scored, tmp_path):
    whole, rest = SmallJudge(limit=1000), SmallJudge(limit=1000)
    build_scores(whole, thirty, tmp_path / "whole", **FEW)
    with pytest.raises(KeyboardInterrupt):
        build_scores(SmallJudge(limit=10), thirty, tmp_path / "cut", **FEW)
    kept = len(list((tmp_path / "cut").glob("score-*")))
    build_scores(rest, thirty, tmp_path / "cut", **FEW)
    assert kept == 2 and rest.limit - whole.limit in (8, 9, 10)


def test_a_resumed_build_asks_the_pairs_that_it_had_chosen(thirty, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        build_scores(SmallJudge(limit=10), thirty, tmp_path / "cut", **FEW)
    monkeypatch.setattr("crosstill.fusion.candidates.choose", None)  # would be called
    build_scores(SmallJudge(), thirty, tmp_path / "cut", **FEW)


@pytest.mark.parametrize(
    "name", matrix(["indptr.npy", "captions.npy", "score-00001.npy"], ["score-00001.npy"])
)
def test_a_damaged_file_of_an_unfinished_build_is_made_again(
    thirty, scored, tmp_path, caplog, name
):
    with pytest.raises(KeyboardInterrupt):
        build_scores(SmallJudge(limit=10), thirty, tmp_path / "cut", **FEW)
    path = tmp_path / "cut" / name
    path.write_bytes(path.read_bytes()[:-3])
    build_scores(SmallJudge(), thirty, tmp_path / "cut", **FEW)
    assert name in caplog.text
    assert contents(tmp_path / "cut") == contents(scored.folder)


def test_finished_work_is_not_done_again(thirty, scored):
    build_scores(SmallJudge(limit=0), thirty, scored.folder, **FEW)


@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_to_any_file_is_found_and_named(scored, tmp_path, damage):
    shutil.copytree(scored.folder, tmp_path / "copy")
    random = np.random.default_rng(0)
    paths = [p for p in (tmp_path / "copy").iterdir() if p.is_file() and p.stat().st_size]
    paths = [p for p in paths if p.name != ".lock"]
    assert len(paths) == 9
    for path in paths * 3:
        whole = path.read_bytes()
        path.write_bytes(damage(whole, random))
        try:
            header = ScoreCache(tmp_path / "copy").header
        except CorruptError as error:
            assert path.name in str(error)
        else:  # white space of the JSON header is all that may change unnoticed
            assert path.name == "scores.json" and header == scored.header
        path.write_bytes(whole)


def test_a_missing_file_says_how_to_make_it_anew(thirty, scored, tmp_path):
    shutil.copytree(scored.folder, tmp_path / "copy")
    (tmp_path / "copy/score-00002.npy").unlink()
    with pytest.raises(CorruptError, match="score-00002.*delete .* and run the same command again"):
        build_scores(SmallJudge(), thirty, tmp_path / "copy", **FEW)


def other_captions(pairs):
    first, *rest = pairs.examples
    return replace(pairs, examples=(replace(first, captions=("another",)), *rest))


CHANGES = [
    ({"teacher": SmallJudge(weights=2.0)}, r"another teacher \(the teacher's weights differ"),
    ({"teacher": None}, "another teacher"),
    ({"pairs": other_captions}, "another dataset"),
    ({"false": 5}, "another number of false captions"),
    ({"false_images": 5}, "another number of false images"),
    ({"find": "batch"}, "another candidate finder"),
    ({"find": SmallTeacher()}, "another candidate finder"),
    ({"seed": 1}, "another seed"),
]
FINISHED = [(change, named, True) for change, named in CHANGES]
UNFINISHED = [(change, named, False) for change, named in CHANGES]


@pytest.mark.parametrize(
    ("change", "named", "finished"),
    matrix(FINISHED + UNFINISHED, [*FINISHED, UNFINISHED[0]]),
)
def test_a_score_cache_of_anything_else_is_refused_by_name(
    thirty, scored, tmp_path, change, named, finished
):
    folder = scored.folder if finished else tmp_path / "cut"
    if not finished:
        with pytest.raises(KeyboardInterrupt):
            build_scores(SmallJudge(limit=9), thirty, folder, **FEW)
    options = FEW | change
    teacher = options.pop("teacher", SmallJudge()) if "teacher" in options else SmallJudge()
    pairs = options.pop("pairs", lambda same: same)(thirty)
    before = contents(folder)
    with pytest.raises(MismatchError, match=named):
        build_scores(teacher, pairs, folder, **options)
    assert contents(folder) == before


def test_neither_kind_of_cache_moves_into_the_other(thirty, scored, cached, tmp_path):
    with pytest.raises(ConfigError, match="holds a score cache; give another --out"):
        build(SmallTeacher(), thirty, scored.folder)
    with pytest.raises(ConfigError, match="holds a feature cache; give another --out"):
        build_scores(SmallJudge(), thirty, cached.folder)
    with pytest.raises(KeyboardInterrupt):
        build_scores(SmallJudge(limit=9), thirty, tmp_path, **FEW)
    with pytest.raises(MismatchError, match="an unfinished cache of another kind"):
        build(SmallTeacher(), thirty, tmp_path)


def test_a_folder_with_other_files_and_one_in_use(thirty, tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ConfigError, match="holds photo.jpg and no cache"):
        build_scores(SmallJudge(), thirty, tmp_path, **FEW)
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"), pytest.raises(LockedError, match="in use by process"):
        build_scores(SmallJudge(), thirty, tmp_path / "c", **FEW)


def test_photos_that_moved_hit(tmp_path):
    scenery.write(tmp_path / "here", 20)
    options = {"false": 2, "false_images": 1}
    build_scores(SmallJudge(), data.open(tmp_path / "here/dataset.json"), tmp_path / "c", **options)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = data.open(tmp_path / "there/dataset.json")
    found = build_scores(SmallJudge(limit=0), moved, tmp_path / "c", **options)
    assert len(cache.pixels(found, found.split("val"), images.Preprocess(size=(8, 8)))) == 2


# --- wrong input ---


@pytest.fixture
def spoilt(tmp_path):
    """Twenty scenes as files, one of them unreadable."""
    scenery.write(tmp_path / "photos", 20)
    (tmp_path / "photos/000003.png").write_bytes(b"no image at all")
    return data.open(tmp_path / "photos/dataset.json")


def test_bad_images_are_set_apart_before_anything_is_chosen(spoilt, tmp_path):
    found = build_scores(SmallJudge(), spoilt, tmp_path / "c", **FEW)
    (line,) = (tmp_path / "c/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "000003.png"
    assert len(found.image_ids) == 19 and found.header["quarantined"] == 1
    with pytest.raises(ImageError, match="000003"):
        build_scores(SmallJudge(), spoilt, tmp_path / "d", **FEW, strict=True)


def test_a_photo_that_went_while_pairs_were_scored_is_one_line(spoilt, tmp_path):
    class Thief(SmallJudge):
        def score(self, images, texts):
            shutil.rmtree(tmp_path / "photos", ignore_errors=True)
            return super().score(images, texts)

    with pytest.raises(InputError, match=r"\.png: cannot be read"):
        build_scores(Thief(), spoilt, tmp_path / "c", **FEW)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"false": -1}, "false = -1"),
        ({"false": 0, "false_images": 0}, "at least one of them above 0"),
        ({"seed": -3}, "seed = -3"),
    ],
)
def test_options_that_cannot_be(thirty, tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        build_scores(SmallJudge(), thirty, tmp_path / "c", **options)
    with pytest.raises(TypeError, match="fales"):
        build_scores(SmallJudge(), thirty, tmp_path / "c", fales=3)


def test_the_wrong_kind_of_teacher(thirty, tmp_path):
    with pytest.raises(ModelError, match="small: embeds each side alone and scores no pairs"):
        build_scores(SmallTeacher(), thirty, tmp_path / "c")
    with pytest.raises(ModelError, match="judge: a fusion model scores pairs and has no features"):
        build_features(SmallJudge(), thirty, tmp_path / "c")


def test_one_door_builds_what_suits_the_teacher(thirty, tmp_path):
    small_meter(tmp_path / "meter", texts_of(thirty))
    students.build(small_config(), dim=8, captions=texts_of(thirty)).save(tmp_path / "dual")
    scored = build(tmp_path / "meter", thirty, tmp_path / "scores", false=2, find=tmp_path / "dual")
    assert isinstance(scored, ScoreCache) and scored.scores is not None
    features = build(str(tmp_path / "dual"), thirty, tmp_path / "features", dtype="fp32")
    again = build_scores(
        teachers.load(tmp_path / "meter"),
        thirty,
        tmp_path / "b",
        false=2,
        find=tmp_path / "features",
    )
    assert (again.pair_captions == scored.pair_captions).all() and features.dim == 8
    unscored = build(None, thirty, tmp_path / "pairs", false=2)
    assert isinstance(unscored, ScoreCache) and unscored.scores is None
    assert isinstance(build(None, thirty, tmp_path / "captions"), Cache)


@pytest.mark.parametrize(
    ("teacher", "options", "match"),
    [
        (SmallTeacher, {"false_images": 3}, "--false-images: small embeds images and captions"),
        (SmallJudge, {"dtype": "fp32"}, "--dtype: judge keeps scores of pairs and no features"),
        (lambda: None, {"views": 2, "false": 3}, "--views: none keeps scores of pairs"),
        (SmallTeacher, {"augment": ("flip",)}, "--augment: makes the views behind the first"),
    ],
)
def test_options_of_the_other_kind_of_cache(thirty, tmp_path, teacher, options, match):
    with pytest.raises(ConfigError, match=match):
        build(teacher(), thirty, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_scores_that_are_not_finite(thirty, tmp_path):
    with pytest.raises(ModelError, match="judge: its scores are not finite"):
        build_scores(SmallJudge(weights=float("nan")), thirty, tmp_path / "c", **FEW)


def test_a_train_split_with_nothing_false(thirty, tmp_path):
    alone = replace(thirty, examples=thirty.examples[:1])
    with pytest.raises(DataError, match="1 images have no false caption"):
        build_scores(SmallJudge(), alone, tmp_path / "c")
    with pytest.raises(DataError, match="6 captions have no false image"):
        build_scores(SmallJudge(), alone, tmp_path / "d", false=0)
    val = replace(thirty, examples=tuple(replace(e, split="val") for e in alone.examples))
    assert build_scores(SmallJudge(), val, tmp_path / "v").least_false("val") == (0, 0)
