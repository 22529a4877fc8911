import pytest
from PIL import Image

from crosstill import cache, data
from support import SmallTeacher


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"shade {number}")
    return place


def test_the_card_beside_the_photos_or_what_is_given(folder):
    assert data.open(folder).licence is None
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nPhotos.\n")
    assert data.open(folder).licence == "cc-by-nc-4.0"
    assert data.open(folder, licence="mine").licence == "mine"
    assert data.open("scenes:20", licence="cc0").licence == "cc0"


def test_a_cache_keeps_them_and_takes_them_later(folder, tmp_path):
    out = tmp_path / "cache"
    made = cache.build(SmallTeacher(), data.open(folder), out)
    assert "licence" not in made.header["data"]
    assert made.teacher["licence"] == "apache-2.0"
    later = cache.build(
        SmallTeacher(), data.open(folder, licence="cc0"), out, teacher_licence="research only"
    )
    assert later.header["data"]["licence"] == "cc0"
    assert later.teacher["licence"] == "research only"
    assert later.digest == made.digest
    again = cache.build(SmallTeacher(), data.open(folder), out)
    assert again.header["data"]["licence"] == "cc0"
