from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from crosstill import data
from crosstill.data import scenes
from crosstill.errors import DataError
from crosstill.images import decode


@pytest.fixture(scope="module")
def pairs() -> data.Pairs:
    return data.open("scenes:300")


def test_each_scene_is_new_and_has_five_captions(pairs):
    assert len({example.image_id for example in pairs.examples}) == 300
    assert all(len(set(example.captions)) == 5 for example in pairs.examples)
    assert pairs.splits == {"train": 240, "val": 30, "test": 30}


def test_full_captions_tell_scenes_apart(pairs):
    assert len({example.captions[0] for example in pairs.examples}) > 295
    every = [text for example in pairs.examples for text in example.captions]
    assert len(set(every)) > 0.85 * len(every)


def test_captions_are_sentences(pairs):
    for text in (text for example in pairs.examples for text in example.captions):
        assert re.fullmatch(r"[A-Z][a-z ,:]+\.", text)
        assert not re.search(r"\ban (?!orange)|\ba orange|  ", text)


def test_a_longer_dataset_begins_with_the_shorter(pairs):
    assert data.open("scenes:7").examples == pairs.examples[:7]
    assert data.open("scenes:7:1").examples[0] != pairs.examples[0]


def test_another_process_renders_the_same_bytes(pairs):
    code = "from crosstill import data; print(data.open('scenes:9').digest())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == data.open("scenes:9").digest()


def test_writing_leaves_a_karpathy_dataset(tmp_path):
    path = scenes.write(tmp_path / "new" / "folder", 3, seed=2)
    value = json.loads(path.read_text())
    assert [item["filename"] for item in value["images"]] == [
        "000000.png",
        "000001.png",
        "000002.png",
    ]
    assert data.open(path).digest() == data.open("scenes:3:2").digest()


def test_plain_scenes_have_short_captions_after_the_five(tmp_path):
    written = data.open(scenes.write(tmp_path, 60, seed=2, plain=True))
    assert written.splits == {"train": 48, "val": 6, "test": 6}
    alone = 0
    for example in written.examples:
        assert all(text.endswith(".") for text in example.captions[:5])
        short = set(example.captions[5:])
        assert len(example.captions) == 5 + len(short)
        things = [text for text in short if text.split()[0] in scenes.COLOURS]  # "red heart"
        assert all(thing.split()[0] in example.captions[0] for thing in things)
        alone += len(things) == 1
    assert 24 < alone < 48


def test_short_captions_name_the_things_as_people_type_them():
    heart = scenes.Thing("heart", "orange", "small", 0, 0, 1, 0)
    star = scenes.Thing("star", "blue", "large", 0, 0, 1, 0)
    alone = ("a blue star", "blue star", "a star", "a large blue star")
    assert scenes.short_captions([star]) == alone
    assert scenes.short_captions([star, heart]) == (
        *("a blue star", "an orange heart", "blue star", "orange heart", "a heart", "a star"),
        *("a large blue star", "a small orange heart"),
        *("a blue star and an orange heart", "a heart and a star"),
    )


@pytest.mark.parametrize("source", ["scenes:", "scenes:0", "scenes:x", "scenes:5:5:5", "scenes:-4"])
def test_wrong_numbers_are_refused(source):
    with pytest.raises(DataError, match=re.escape(source)):
        data.open(source)


def test_default_count_is_said():
    assert scenes._parse("scenes") == (scenes.COUNT, 0)
    assert scenes._parse("scenes:9") == (9, 0)
    assert scenes._parse("scenes:9:4") == (9, 4)


@pytest.mark.parametrize("shape", scenes.OUTLINES)
@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_a_shape_is_drawn_where_and_as_said(shape, colour):
    thing = scenes.Thing(shape, colour, "large", 30.0, 60.0, 18.0, 0.0)
    scene = scenes.Scene((thing,), across=True, band=1, background="white")
    pixels = decode(scenes.render(scene, random.Random(0)), "x").numpy().astype(int)
    near = np.abs(pixels - scenes.COLOURS[colour]).max(2) < 30
    rows, columns = np.nonzero(near)
    assert near.sum() > 250
    assert abs(columns.mean() - 30) < 2
    assert abs(rows.mean() - 60) < 5
    assert (rows.min(), columns.min()) >= (40, 10)


def test_order_of_things_is_what_captions_say():
    for index in range(200):
        scene = scenes.compose(random.Random(index))
        places = [thing.x if scene.across else thing.y for thing in scene.things]
        assert places == sorted(places)
        assert all(12 < place < 84 for place in places)


def test_the_file_is_a_png_of_96_pixels(pairs):
    image = Image.open(io.BytesIO(pairs.read(pairs.examples[0])))
    assert (image.format, image.size, image.mode) == ("PNG", (96, 96), "RGB")


def test_things_are_named_as_the_captions_name_them():
    for index in range(20):
        captions = " ".join(scenes.scene(3, index)[1]).lower()
        for thing in scenes.compose(random.Random(f"scene:3:{index}")).things:
            assert scenes.name_thing(thing) in captions
