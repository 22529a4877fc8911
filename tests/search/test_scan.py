import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from crosstill.errors import DataError, ImageError, printable
from crosstill.search import scan
from crosstill.search.scan import Stamp

LINKED = "a link to a folder, not entered"
OUTSIDE = "a link out of the folder, not followed"


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def put(root: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_photos_are_found_by_their_suffix_in_the_order_of_their_names(root):
    put(root, "b.jpg", "a/2.PNG", "a/10.webp", "notes.txt", "a.pdf", "jpg", "film.gif", "x.svg")
    found = scan.walk(root)
    assert list(found.photos) == ["a/10.webp", "a/2.PNG", "b.jpg", "film.gif"]
    assert found.problems == {} and found.closed == []


def test_hidden_files_and_folders_are_skipped_without_a_word(root):
    put(root, ".a.jpg", ".trash/b.jpg", "c/.d/e.jpg", "f.jpg")
    found = scan.walk(root)
    assert list(found.photos) == ["f.jpg"] and found.problems == {}


def test_the_index_among_the_photos_is_not_entered(root):
    put(root, "a.jpg", "index/thumbnails/b.jpg")
    assert list(scan.walk(root, skip=root / "index").photos) == ["a.jpg"]


def test_stamps_tell_of_photo_and_caption(root):
    put(root, "a.jpg", data=b"12345")
    put(root, "a.txt", data=b"words")
    put(root, "b.jpg", data=b"123")
    os.utime(root / "a.jpg", ns=(1, 123_456_789))
    os.utime(root / "a.txt", ns=(1, 987_654_321))
    os.utime(root / "b.jpg", ns=(1, 5))
    found = scan.walk(root).photos
    ctimes = {name: (root / name).stat().st_ctime_ns for name in ("a.jpg", "a.txt", "b.jpg")}
    assert found == {
        "a.jpg": Stamp(5, 123_456_789, ctimes["a.jpg"], 5, 987_654_321, ctimes["a.txt"]),
        "b.jpg": Stamp(3, 5, ctimes["b.jpg"], -1, -1, -1),
    }


def test_links_stay_inside_the_folder(root):
    put(root, "a.jpg", "deep/b.jpg", "c.txt")
    put(root.parent, "secret.jpg", "photos2/x.jpg", "secret.txt")
    (root / "in.jpg").symlink_to("deep/b.jpg")
    (root / "up.jpg").symlink_to("../secret.jpg")
    (root / "absolute.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "sibling.jpg").symlink_to("../photos2/x.jpg")  # shares the beginning of its name
    (root / "chain.jpg").symlink_to("up.jpg")
    (root / "a.txt").symlink_to("../secret.txt")
    found = scan.walk(root)
    assert list(found.photos) == ["a.jpg", "deep/b.jpg", "in.jpg"]
    assert found.problems == dict.fromkeys(
        ["up.jpg", "absolute.jpg", "sibling.jpg", "chain.jpg"], OUTSIDE
    )
    assert found.photos["a.jpg"].caption_size == -1, "a caption from outside the folder"


def odd_things(root: Path) -> dict[str, str | None]:
    """Everything odd that a folder can hold, and what must be said of it; None: it is a photo."""
    put(root, "deep/photo.jpg")
    (root / "deep/loop").symlink_to("..")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "dead.jpg").symlink_to("nothing.jpg")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    (root / "piped.jpg").symlink_to("pipe.jpg")
    odd: dict[str, str | None] = {
        "deep/loop": LINKED,
        "self.jpg": "Too many levels of symbolic links",
        "dead.jpg": "a link to nothing",
        "pipe.jpg": "not a file but a named pipe",
        "piped.jpg": "not a file but a named pipe",
        "deep/photo.jpg": None,
    }
    for name in (b"bytes\xff\xfe.jpg", b"line\nbreak.jpg", b"n" * 251 + b".jpg"):
        (root / os.fsdecode(name)).write_bytes(b"x")
        odd[os.fsdecode(name)] = None
    rtl = "\u202egpj.\u05e9\u05dc\u05d5\u05dd.jpg"
    put(root, rtl)
    return odd | {rtl: None}


def test_everything_odd_is_survived_and_reported(root):
    odd = odd_things(root)
    found = scan.walk(root)
    assert set(found.photos) == {name for name, why in odd.items() if why is None}
    assert found.problems == {name: why for name, why in odd.items() if why is not None}
    for name in found.photos:
        assert scan.read_photo(root, name) == b"x"


def test_a_socket_and_a_device_are_no_photos(root, monkeypatch):
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root)  # the name of a socket has a hundred bytes at most
        listening.bind("socket.jpg")
        try:
            os.mknod(root / "device.jpg", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            (root / "device.jpg").symlink_to("/dev/null")
        problems = scan.walk(root).problems
    assert problems["socket.jpg"] == "not a file but a socket"
    assert problems["device.jpg"] in ("not a file but a device", OUTSIDE)


def test_a_pipe_in_the_place_of_a_photo_is_never_waited_for(root):
    os.mkfifo(root / "a.jpg")
    with pytest.raises(ImageError, match=r"a\.jpg: not a file but a named pipe"):
        scan.read_photo(root, "a.jpg")
    os.mkfifo(root / "a.txt")
    assert scan.read_caption(root, "a.jpg") == ""


class Closed:
    """`os.scandir`, but some folders cannot be listed, and some entries vanish."""

    def __init__(self, root: Path, closed: dict[str, OSError], vanishing: str = "") -> None:
        self.scandir = os.scandir
        self.closed = {str(root / name): error for name, error in closed.items()}
        self.vanishing = vanishing

    def __call__(self, path):
        if error := self.closed.get(str(path)):
            raise error
        listing = self.scandir(path)
        if self.vanishing and (Path(path) / self.vanishing).exists():
            (Path(path) / self.vanishing).unlink()
        return listing


def test_an_unreadable_folder_is_reported_and_the_rest_is_found(root, monkeypatch):
    put(root, "a.jpg", "closed/b.jpg", "gone/c.jpg", "z/d.jpg")
    errors = {"closed": PermissionError(13, "Permission denied"), "gone": FileNotFoundError(2, "?")}
    monkeypatch.setattr(os, "scandir", Closed(root, errors))
    found = scan.walk(root)
    assert list(found.photos) == ["a.jpg", "z/d.jpg"]
    assert found.problems["closed"] == "Permission denied"
    assert found.closed == ["closed"], "what has vanished is not closed"


def test_a_file_that_vanishes_while_its_folder_is_read(root, monkeypatch):
    put(root, "a.jpg", "b.jpg")
    monkeypatch.setattr(os, "scandir", Closed(root, {}, vanishing="b.jpg"))
    found = scan.walk(root)
    assert list(found.photos) == ["a.jpg"]
    assert found.problems in ({"b.jpg": "vanished"}, {})  # it may not even be listed
    with pytest.raises(ImageError, match=r"b\.jpg: vanished"):
        scan.read_photo(root, "b.jpg")


def test_a_folder_that_cannot_be_listed_at_all_is_refused(root):
    shutil.rmtree(root)
    with pytest.raises(DataError, match="photos: No such file or directory; give a folder"):
        scan.walk(root)


def test_a_path_too_long_for_the_system_is_reported(root):
    here = os.open(root, os.O_RDONLY)
    for _ in range(20):  # made step by step, since no call takes a path this long
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    put(root, "a.jpg")
    found = scan.walk(root)
    assert list(found.photos) == ["a.jpg"]
    assert list(found.problems.values()) == ["File name too long"]


def test_captions_are_cut_and_decoded_whatever_they_hold(root):
    put(root, "a.jpg")
    for data, expected in (
        (b"a dog\n", "a dog"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"caf\xe9", "caf\ufffd"),
        ("é".encode() * 20_000, "é" * 10_000),
        ("\U0001f415".encode() * 20_000, "\U0001f415" * 10_000),
        (b"", ""),
    ):
        put(root, "a.txt", data=data)
        assert scan.read_caption(root, "a.jpg") == expected
    assert scan.read_caption(root, "b.jpg") == ""


def test_a_huge_file_is_refused_before_it_is_read(root):
    with (root / "huge.jpg").open("wb") as file:
        file.truncate(scan.MAX_BYTES + 1)  # takes no room
    with pytest.raises(ImageError, match=r"huge\.jpg: larger than 512 MB"):
        scan.read_photo(root, "huge.jpg")


def test_names_are_printed_on_one_line_without_control_characters():
    assert printable("plain é.jpg") == "plain é.jpg"
    assert printable(os.fsdecode(b"a\xffb\n\x1b[31m.jpg")) == r"a\xffb\n\x1b[31m.jpg"
    assert printable("\u202egpj") == r"\u202egpj"
