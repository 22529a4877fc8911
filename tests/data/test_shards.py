"""Tar shards: what the webdataset library reads of them, what is damaged, and going on anywhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from crosstill import data
from crosstill.data import scenes
from crosstill.data.shards import Faults, Position, stream
from crosstill.errors import DataError, ImageError
from crosstill.types import image_id
from support import flip

Parts = list[tuple[str, bytes | str]]


def shard(path: Path, parts: Parts, **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, content in parts:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(start: int, count: int, caption: str = "caption") -> Parts:
    parts: Parts = []
    for number in range(start, start + count):
        image, _ = scenes.scene(3, number)
        parts += [(f"{number:06d}.png", image), (f"{number:06d}.txt", f"{caption} {number}")]
    return parts


@pytest.fixture
def shards(tmp_path: Path) -> str:
    (tmp_path / "s").mkdir()
    for number, count in enumerate((4, 1, 5)):
        shard(tmp_path / f"s/{number:03d}.tar", samples(10 * number, count))
    return f"{tmp_path}/s/{{000..002}}.tar"


def reasons(pairs: data.Pairs) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in pairs.quarantine.rows}


def test_the_webdataset_library_reads_the_same(shards):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    expected = []
    for path in sorted(Path(shards).parent.glob("*.tar")):
        with path.open("rb") as file:
            for item in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                expected.append((item["__key__"], item["png"], item["txt"].decode()))
    found = [(s.path.rpartition("/")[2][:-4], s.image, s.captions[0]) for s in stream(shards)]
    assert found == expected
    assert len(found) == 10


def test_the_stream_and_the_opened_dataset_are_one(shards):
    pairs = data.open(shards)
    told = [(sample.path, image_id(sample.image)) for sample in stream(shards)]
    assert [(example.path, example.image_id) for example in pairs.examples] == told


def test_each_sample_says_where_the_next_one_begins(shards):
    whole = list(stream(shards))
    for number, sample in enumerate(whole):
        assert list(stream(shards, start=sample.start)) == whole[number:]
        assert list(stream(shards, start=sample.next)) == whole[number + 1 :]


GO_ON = """
import json, sys
from crosstill.data.shards import Position, stream
for start in json.loads(sys.argv[2]):
    after = [[s.path, s.captions, s.next] for s in stream(sys.argv[1], Position(*start))]
    print(json.dumps(after))
"""


@pytest.mark.slow
def test_another_process_goes_on_at_exactly_the_next_sample(shards):
    whole = list(stream(shards))
    stops = (3, 4, 5)  # within a shard, at its end, at the end of the next
    starts = json.dumps([whole[stop - 1].next for stop in stops])
    done = subprocess.run(
        [sys.executable, "-c", GO_ON, shards, starts], capture_output=True, text=True, check=True
    )
    for stop, line in zip(stops, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [[s.path, s.captions, list(s.next)] for s in whole[stop:]]


def test_long_names_and_extended_headers_are_part_of_a_position(tmp_path):
    parts = [(f"{'deep/' * 40}{n}é.{kind}", kind) for n in range(3) for kind in ("png", "txt")]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = shard(tmp_path / "long.tar", parts, format=form)
        whole = list(stream(path))
        assert len(whole) == 3
        assert list(stream(path, start=whole[1].next)) == whole[2:]


def test_a_position_elsewhere_is_refused(shards):
    with pytest.raises(DataError, match=r"no shard '9\.tar' to go on from"):
        list(stream(shards, start=Position("9.tar", 0)))
    with pytest.raises(ImageError, match=r"000\.tar: corrupt at byte 700 .*a bad header"):
        list(stream(shards, start=Position("000.tar", 700)))


def test_captions_of_text_and_json_and_the_split_of_json(tmp_path):
    told = {"caption": "one", "captions": None, "split": "restval", "url": "x"}
    path = shard(
        tmp_path / "test.tar",
        [
            ("a.v1.jpg", b"a"),
            ("a.txt", "\ufeffone\n\n two \n"),
            ("a.json", json.dumps(told)),
            ("b.jpeg", b"b"),
            ("b.caption", "three"),
        ],
    )
    pairs = data.open(path)
    assert [(e.captions, e.split) for e in pairs.examples] == [
        (("one", "two"), "train"),
        (("three",), "test"),
    ]


@pytest.mark.parametrize("every", [37])
def test_a_shard_cut_anywhere_is_named_and_the_rest_is_read(every, tmp_path):
    path = shard(tmp_path / "0.tar", samples(0, 1))
    whole, first = path.read_bytes(), next(stream(path))
    shard(tmp_path / "1.tar", samples(1, 1))
    for length in range(1, first.next.offset + 512, every * 13):
        path.write_bytes(whole[:length])
        pairs = data.open(tmp_path)
        assert "0.tar" in reasons(pairs), length
        assert "corrupt at byte" in reasons(pairs)["0.tar"]
        assert "000001.png" in pairs.examples[-1].path


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_flipped_bits_never_crash_and_lose_nothing_unsaid(count, tmp_path):
    random = np.random.default_rng(0)
    path = shard(tmp_path / "0.tar", samples(0, 3))
    whole, known = path.read_bytes(), list(stream(path))
    headers = [at for s in known for at in range(s.start.offset, s.start.offset + 512)]
    for _ in range(count):
        damaged = bytearray(flip(whole, random))
        damaged[random.choice(headers)] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        faults = Faults()
        found = list(stream(path, faults=faults))
        assert len(found) == 3 or faults.bad or faults.notes


def test_what_is_odd_in_a_shard_is_said(tmp_path):
    def link(name: str, kind: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "a.png"
        archive.addfile(info)

    path = shard(tmp_path / "0.tar", samples(0, 1))
    with tarfile.open(path, "a") as archive:
        link("soft.png", tarfile.SYMTYPE)
        link("hard.png", tarfile.LNKTYPE)
        link("pipe.png", tarfile.FIFOTYPE)
        link("folder.png", tarfile.DIRTYPE)
    extra = [
        ("._000000.png", b"of a Mac"),
        ("two.jpg", b"1"),
        ("two.png", b"2"),
        ("two.txt", "two"),
        ("alone.png", b"3"),
        ("lonely.txt", "no image"),
        ("empty.png", b""),
        ("empty.txt", "empty"),
        ("bad.png", b"4"),
        ("bad.json", "{"),
        ("latin.png", b"5"),
        ("latin.txt", b"caf\xe9"),
        ("../../up.png", b"6"),
        ("../../up.txt", "up"),
        ("/abs.png", b"7"),
        ("/abs.txt", "abs"),
        ("again.png", b"8"),
        ("again.txt", "first"),
        ("again.png", b"9"),
        ("again.txt", "second"),
    ]
    with tarfile.open(path, "a") as archive:
        for name, content in extra:
            info = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    pairs = data.open(path)
    assert [(e.path.partition("/")[2], e.captions) for e in pairs.examples] == [
        ("000000.png", ("caption 0",)),
        ("two.jpg", ("two",)),
        ("alone.png", ()),
        ("bad.png", ()),
        ("latin.png", ()),
        ("../../up.png", ("up",)),
        ("/abs.png", ("abs",)),
        ("again.png", ("first",)),
        ("again.png", ("second",)),
    ]
    told = {path.rpartition("/")[2]: reason for path, reason in reasons(pairs).items()}
    assert told == {
        "soft.png": "a link in the archive",
        "hard.png": "a link in the archive",
        "pipe.png": "no regular file",
        "two.png": "a second image of the sample two",
        "empty.png": "empty file",
        "bad.json": "corrupt JSON",
        "latin.txt": "corrupt captions: not UTF-8",
    }
    assert pairs.notes[1:] == (
        "photos without captions: 3",
        "members that are neither images nor captions, not read: 1",
        "captions without an image beside them in the shard: 1",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]
    with pytest.raises(ImageError, match=r"(soft|two|empty)\.png"):
        data.open(path, strict=True)
    with pytest.raises(ImageError, match=r"soft\.png: a link"):
        list(stream(path))


def test_a_sparse_member_is_set_apart(tmp_path):
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(2**20)
    (tmp_path / "hole.txt").write_text("a hole")
    made = subprocess.run(
        ["tar", "--sparse", "-cf", "0.tar", "hole.png", "hole.txt"], cwd=tmp_path, check=False
    )
    if made.returncode:
        pytest.skip("no GNU tar here")
    with pytest.raises(DataError, match=r"0\.tar/hole\.png: a sparse member"):
        data.open(tmp_path / "0.tar")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("named", ["plain", "honest"])
def test_a_compressed_shard_is_refused(mode, named, tmp_path):
    ending = f".tar.{mode[2:]}" if named == "honest" else ".tar"
    path = tmp_path / f"0{ending}"
    with tarfile.open(path, mode) as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"0\.tar.*: compressed; unpack it to a plain \.tar"):
        data.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"0\.tar: nothing in it can be used, first 0\.tar: corrupt at byte 0 of 0"),
        (b"no tar" * 1000, r"nothing in it can be used, first 0\.tar: corrupt at byte 0 of 6000"),
        (bytes(10240), r"0\.tar: no images in it"),
    ],
)
def test_what_is_no_shard_says_so(content, message, tmp_path):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.open(tmp_path / "0.tar")
    assert "\n" not in str(caught.value)


def test_archives_behind_each_other_are_told(tmp_path):
    one, two = shard(tmp_path / "a.tar", samples(0, 1)), shard(tmp_path / "b.tar", samples(1, 1))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    pairs = data.open(both)
    assert len(pairs) == 1
    assert "another archive behind the first" in reasons(pairs)["both.tar"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"caption": 7}, r"0\.tar/a\.json: a caption is the int 7"),
        ({"captions": ["x", {}]}, r"0\.tar/a\.json: a caption is an object"),
        ({"caption": "x", "split": "trian"}, r"0\.tar/a\.json: unknown split 'trian'"),
    ],
)
def test_wrong_json_of_a_sample(told, message, tmp_path):
    path = shard(tmp_path / "0.tar", [("a.png", b"a"), ("a.json", json.dumps(told))])
    with pytest.raises(DataError, match=message):
        data.open(path)


def test_a_shard_that_changed_later_is_an_image_error(shards):
    pairs = data.open(shards)
    path = Path(pairs.source["root"]) / "002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ImageError, match=r"002\.tar@.*shorter than it was"):
        pairs.read(pairs.examples[-1])
    path.unlink()
    with pytest.raises(ImageError, match=r"002\.tar@.*No such file"):
        pairs.read(pairs.examples[-1])


def test_any_order_of_names_with_dots_pairs_rightly_and_goes_on_anywhere(tmp_path):
    random = np.random.default_rng(0)
    stems, endings = ["a", "a.b", "a.v1", "a.v2", "b", "b.1"], ["jpg", "heic", "txt", "caption"]
    for _ in range(400):
        names = sorted(
            {f"{random.choice(stems)}.{random.choice(endings)}" for _ in range(random.integers(9))},
            key=lambda name: (name.partition(".")[0], random.random()),  # keys stand together
        )
        path = shard(tmp_path / "0.tar", [(name, name) for name in names])
        faults = Faults()
        whole = list(stream(path, faults=faults))
        images = [name for name in names if name.endswith(("jpg", "heic"))]
        assert len(whole) + len(faults.bad) == len(images)
        for number, sample in enumerate(whole):
            own = sample.path.rpartition("/")[2].rpartition(".")[0]
            texts = {caption.rpartition(".")[0] for caption in sample.captions}
            of_key = {name.rpartition(".")[0] for name in images if name[0] == own[0]}
            # a key's own text may go to its only image
            assert texts <= ({own, own[0]} if len(of_key) == 1 else {own}), names
            on = list(stream(path, start=sample.next, faults=Faults()))
            again = list(stream(path, start=sample.start, faults=Faults()))
            assert (on, again) == (whole[number + 1 :], whole[number:]), names
