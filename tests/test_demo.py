from PIL import Image

from crosstill import data, demo
from crosstill.data import scenes
from crosstill.evaluate import embed
from support import SmallTeacher


def test_the_picture_of_what_was_found(tmp_path):
    pairs = data.open("scenes:40").split("test")
    demo.sheet(pairs, embed(SmallTeacher(), pairs), tmp_path / "found.png", queries=3, top=2)
    picture = Image.open(tmp_path / "found.png").convert("RGB")
    assert picture.size == (268, 468)
    assert (50, 205, 50) in {color for _, color in picture.getcolors(1 << 20)}  # a right one


def test_the_demo_can_be_run_again_where_it_stopped(tmp_path, monkeypatch):
    for name in ("TEACHER", "STUDENT"):
        monkeypatch.setattr(demo, name, ("epochs=1", "batch_size=100", "captions_per_image=5"))
    text = demo.run(tmp_path, count=40)
    assert "of its RSUM" in text and (tmp_path / "found.png").is_file()
    assert "4 held-out scenes, 20 captions" in text  # the short ones are not counted
    written = data.open(str(tmp_path / "scenes/dataset.json"))
    assert written.digest() == data.open(scenes.write(tmp_path / "same", 40, plain=True)).digest()
    assert all(f'"{query}"' in text for query in ("a red heart", "a blue ring", "a yellow star"))
    assert demo.run(tmp_path, count=40) == text
